"""The bundle's manifest: what the exporter writes and what every reader checks first. JSON, no code, no torch.

Reading order of a consumer: :func:`load_manifest` (shape and schema), :meth:`Manifest.check_files` (sizes; hashes on demand).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shlex
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dmtd_runtime.bundle import contract
from dmtd_runtime.errors import BundleError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Dimensions of the decoder. ``max_window`` is the longest window a graph accepts: KV capacity must leave room for it."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_word_embeddings: bool
    dtype: Literal["float32", "float16", "bfloat16"]
    max_model_len: int
    max_window: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleInfo:
    """The split of the layers and the convention of the weights (design: E, T, D, tau)."""

    encoding_layers: int
    thinking_layers: int
    decoding_layers: int
    cycle_length: int
    cycle_origin: Literal["absolute", "prompt"]
    prompt_input: Literal["cyclical", "thinking", "sum"]
    dmtd_trained: bool

    @property
    def encoding_range(self) -> range:
        return range(self.encoding_layers)

    @property
    def thinking_range(self) -> range:
        return range(self.encoding_layers, self.encoding_layers + self.thinking_layers)

    @property
    def decoding_range(self) -> range:
        start = self.encoding_layers + self.thinking_layers
        return range(start, start + self.decoding_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One named input or output of a graph; a symbolic dimension is a string."""

    name: str
    dims: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInfo:
    """One graph file and its full I/O contract.

    ``slots``: attention nodes a packed layer has. ``weights``: its initializers in the weights file (``contract.stack_parts``).
    """

    name: contract.GraphName
    dialect: contract.Dialect
    file: str
    slots: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightInfo:
    """Where a tensor stands in the weights file, and numbers that its values must reproduce (see dmtd_export.bundle.weights)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    norm: float
    probe: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """Size and SHA-256 of a file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a reader must know before it opens a graph."""

    schema: int
    model: ModelInfo
    cycle: CycleInfo
    graphs: tuple[GraphInfo, ...]
    weights: Mapping[str, WeightInfo]
    files: Mapping[str, FileInfo]
    tools: Mapping[str, str]
    verification: Mapping[str, Any] = field(default_factory=dict)

    def graph(self, name: contract.GraphName, dialect: contract.Dialect, slots: int = 1) -> GraphInfo:
        """The graph asked for; BundleError names what the bundle has instead."""
        for graph in self.graphs:
            if (graph.name, graph.dialect, graph.slots) == (name, dialect, slots):
                return graph
        has = ", ".join(graph.file for graph in self.graphs)
        target = "onnxruntime" if dialect == contract.ONNXRUNTIME else "tensorrt"
        raise BundleError(
            f"bundle has no {name} graph in the {dialect} dialect for {slots} slot(s), only {has}; "
            f"export it with --target {target} (or all)"
        )

    @property
    def decoder_graphs(self) -> tuple[GraphInfo, ...]:
        """The graphs that hold layers: all but those that choose tokens."""
        return tuple(graph for graph in self.graphs if graph.name not in contract.CHOICE_GRAPHS)

    @property
    def choice_graphs(self) -> tuple[GraphInfo, ...]:
        """The graphs that choose tokens from logits, in whatever bundle."""
        return tuple(graph for graph in self.graphs if graph.name in contract.CHOICE_GRAPHS)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @property
    def default_dialect(self) -> contract.Dialect:
        """ONNX Runtime's own graphs where the bundle has them."""
        dialects = {graph.dialect for graph in self.decoder_graphs}
        return contract.ONNXRUNTIME if contract.ONNXRUNTIME in dialects else contract.STANDARD

    @property
    def max_num_seqs(self) -> int | None:
        """Sequences at a time that ONNX Runtime's own graphs were exported for; None where the bundle has none of them."""
        return max(
            (graph.slots for graph in self.decoder_graphs if graph.dialect == contract.ONNXRUNTIME), default=None
        )

    def unlisted_assets(self, directory: Path) -> list[str]:
        """Files that a runtime would read, and that nothing vouches for."""
        return [name for name in contract.ASSET_FILES if name not in self.files and (directory / name).exists()]

    def check_files(self, directory: Path, *, hashes: bool, on_bytes: Callable[[int], None] | None = None) -> None:
        """Raise BundleError for a file that is missing, has another size or (``hashes``) another content.

        ``on_bytes`` is told how many bytes were hashed, for a progress bar.
        """
        for name in self.unlisted_assets(directory):
            raise BundleError(f"{directory / name} is not in the manifest's list of files; remove it, or export again")
        for name, info in self.files.items():
            path = directory / safe_relative(name)
            if not os.access(path, os.R_OK) and path.is_file():
                raise BundleError(f"{path} cannot be read; mend its permissions")
            if not path.is_file():
                raise BundleError(f"{path} is missing, the manifest lists it; export the bundle again")
            size = path.stat().st_size
            if size != info.bytes:
                raise BundleError(
                    f"{path} has {size} bytes, the manifest says {info.bytes}: truncated or altered; export the bundle again"
                )
            if hashes and (got := sha256_of(path, on_bytes)) != info.sha256:
                raise BundleError(
                    f"{path} has SHA-256 {got[:16]}..., the manifest says {info.sha256[:16]}...: altered; export the bundle again"
                )


def safe_relative(name: str) -> PurePosixPath:
    """A path inside the bundle; BundleError for anything that could leave it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise BundleError(
            f"manifest names the file {name!r}, expected a path inside the bundle; do not use this bundle"
        )
    return path


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()


def load_manifest(directory: Path) -> Manifest:
    """Read and check ``directory``/manifest.json. Raises BundleError in one line for whatever is wrong with it."""
    path = directory / contract.MANIFEST_FILE
    if not directory.is_dir():
        raise BundleError(
            f"{directory} is not a directory; make a bundle with: dmtd export MODEL -o {shlex.quote(str(directory))}"
        )
    if not path.is_file():
        raise BundleError(
            f"{directory} has no manifest.json, so it is not a bundle; make one with: dmtd export MODEL -o OUT"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}); export the bundle again") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int):
        raise BundleError(f"{path} has no integer 'schema'; it is not a DMTD bundle's manifest")
    if raw["schema"] < contract.SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema {raw['schema']}, expected {contract.SCHEMA_VERSION}: another version of dmtd made it; "
            "export the bundle again"
        )
    if raw["schema"] > contract.SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema {raw['schema']}, this version reads up to {contract.SCHEMA_VERSION}; "
            "upgrade with: pip install -U dmtd"
        )
    try:
        manifest: Manifest = decode(Manifest, raw, "manifest")
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from None
    _check_consistency(manifest, path)
    return manifest


def _check_consistency(manifest: Manifest, path: Path) -> None:
    cycle, model = manifest.cycle, manifest.model
    parts = (cycle.encoding_layers, cycle.thinking_layers, cycle.decoding_layers)
    if sum(parts) != model.num_layers or min(parts) < 0 or min(parts[1:]) < 1 or cycle.cycle_length < 1:
        raise BundleError(
            f"{path}: split E{parts[0]} T{parts[1]} D{parts[2]} with cycle length {cycle.cycle_length} "
            f"does not fit {model.num_layers} layers; export the bundle again"
        )
    for name in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_model_len",
        "max_window",
    ):
        if (size := getattr(model, name)) < 1:
            raise BundleError(f"{path}: model.{name} is {size}, expected at least 1; export the bundle again")
    if not model.max_window >= contract.MIN_WINDOW or cycle.cycle_length > model.max_window:
        raise BundleError(
            f"{path}: max_window is {model.max_window}, expected at least {contract.MIN_WINDOW} and the cycle length "
            f"{cycle.cycle_length}; export the bundle again"
        )
    for name in contract.ROTARY_TABLES:
        rows = manifest.weights[name].shape[0] if name in manifest.weights else 0
        if rows != model.max_model_len + model.max_window:
            raise BundleError(
                f"{path}: {name} has {rows} rows, expected max_model_len + max_window = "
                f"{model.max_model_len + model.max_window}; export the bundle again"
            )
    if not manifest.decoder_graphs:
        raise BundleError(f"{path} lists no graphs; export the bundle again")
    for name in manifest.files:
        safe_relative(name)
    for graph in manifest.graphs:
        if graph.file not in manifest.files:
            raise BundleError(f"{path}: graph file {graph.file} is not in the list of files; export the bundle again")


def decode(kind: Any, raw: Any, where: str) -> Any:
    """Build ``kind`` (dataclasses, tuples, mappings, literals, scalars) from JSON; ValueError names the place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return raw
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(raw, dict):
            raise ValueError(f"{where} is {type(raw).__name__}, expected an object")
        hints = _hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind)}
        missing = [
            name
            for name, f in known.items()
            if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        return kind(**{name: decode(hints[name], raw[name], f"{where}.{name}") for name in known if name in raw})
    if origin is tuple:
        if not isinstance(raw, list):
            raise ValueError(f"{where} is {type(raw).__name__}, expected a list")
        return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(raw, dict):
            raise ValueError(f"{where} is {type(raw).__name__}, expected an object")
        return {name: decode(args[1], item, f"{where}.{name}") for name, item in raw.items()}
    if origin is Literal:
        if raw not in args:
            raise ValueError(f"{where} is {raw!r}, expected one of {', '.join(map(str, args))}")
        return raw
    if origin is types.UnionType:
        return _decode_union(args, raw, where)
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        raise ValueError(f"{where} is {raw!r}, expected {kind.__name__}")
    return raw


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode_union(kinds: tuple[Any, ...], raw: Any, where: str) -> Any:
    for kind in kinds:
        if kind is type(None):
            if raw is None:
                return None
        elif isinstance(raw, kind) and not isinstance(raw, bool):
            return raw
    raise ValueError(f"{where} is {raw!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
