"""The bundle's manifest: what the exporter writes and what every reader checks first. JSON, no code, no torch.

Reading order of a consumer: :func:`load_manifest` (shape and schema), :meth:`Manifest.check_files` (sizes; hashes on demand).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dmtd_errors.pointers import lfs_pointer
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.json_records import decode
from dmtd_runtime.errors import BundleError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
HASH_CHUNK_BYTES = 1 << 22
PAGE_BYTES = 4096  # what groups of weights are aligned to


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
                if (pointer := lfs_pointer(path)) is not None:
                    raise BundleError(f"{path}: {pointer}")
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


def _unreachable(path: Path) -> str | None:
    """Why nothing can be said of a path: no right to pass a directory above it, a ring of links, a name that is too long."""
    try:
        path.stat()
    except FileNotFoundError:
        return (
            f"{path} is a link to {path.readlink()}, which is not there; mend the link" if path.is_symlink() else None
        )
    except NotADirectoryError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        return f"{path} cannot be reached: {getattr(error, 'strerror', None) or error}; mend that, or name another directory"
    return None


def load_manifest(directory: Path) -> Manifest:
    """Read and check ``directory``/manifest.json. Raises BundleError in one line for whatever is wrong with it."""
    path = directory / contract.MANIFEST_FILE
    problem = _unreachable(directory) or _unreachable(path)
    if problem is not None:
        raise BundleError(problem)
    if not directory.is_dir():
        raise BundleError(
            f"{directory} is not a directory; make a bundle with: dmtd export MODEL -o {shlex.quote(str(directory))}"
        )
    if not path.is_file():
        raise BundleError(
            f"{directory} has no manifest.json, so it is not a bundle; make one with: dmtd export MODEL -o OUT"
        )
    if (pointer := lfs_pointer(path)) is not None:
        raise BundleError(f"{path}: {pointer}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}; mend that") from None
    except (ValueError, RecursionError) as error:
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
        rows = next(iter(manifest.weights[name].shape), 0) if name in manifest.weights else 0
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
    for fault in (*_faults_of_weights(manifest), *_faults_of_model(manifest), *_faults_of_graphs(manifest)):
        raise BundleError(f"{path}: {fault}; export the bundle again")


def _faults_of_weights(manifest: Manifest) -> Iterator[str]:
    """Tensors fill the weights file one behind another; a group of them begins at a page."""
    stored, end = manifest.files.get(contract.WEIGHTS_FILE), 0
    if stored is None:
        yield f"the list of files lacks {contract.WEIGHTS_FILE}"
        return
    for name, info in sorted(manifest.weights.items(), key=lambda item: item[1].offset):
        if info.dtype != manifest.model.dtype or not info.shape or min(info.shape) < 1:
            yield f"weight {name} is {info.dtype} {list(info.shape)}, expected {manifest.model.dtype} and no empty shape"
            return
        if info.length != math.prod(info.shape) * DTYPE_BYTES[info.dtype]:
            yield f"weight {name} of shape {list(info.shape)} has {info.length} bytes"
        if info.offset not in (end, -(-end // PAGE_BYTES) * PAGE_BYTES):
            yield f"weight {name} begins at byte {info.offset}, the one before it ends at {end}"
        end = info.offset + info.length
    if end != stored.bytes:
        yield f"the weights end at byte {end}, {contract.WEIGHTS_FILE} has {stored.bytes}"


def _faults_of_model(manifest: Manifest) -> Iterator[str]:
    """The model's dimensions are those of its weights."""
    model, layer = manifest.model, "model.layers.0."
    hidden, head = model.hidden_size, model.head_dim
    expected = {
        "model.embed_tokens.weight": (model.vocab_size, hidden),
        f"{layer}self_attn.q_proj.weight": (model.num_heads * head, hidden),
        f"{layer}self_attn.k_proj.weight": (model.num_kv_heads * head, hidden),
        f"{layer}mlp.up_proj.weight": (model.intermediate_size, hidden),
    }
    expected |= dict.fromkeys(contract.ROTARY_TABLES, (model.max_model_len + model.max_window, head // 2))
    if not model.tie_word_embeddings:
        expected["lm_head.weight"] = (model.vocab_size, hidden)
    elif "lm_head.weight" in manifest.weights:
        yield "model.tie_word_embeddings is true, and lm_head.weight is stored"
    for name, shape in expected.items():
        found = manifest.weights.get(name)
        if found is None or found.shape != shape:
            got = "missing" if found is None else str(list(found.shape))
            yield f"weight {name} is {got}, expected {list(shape)} by the model's dimensions"
    ids = (*model.eos_token_ids, *(() if model.bos_token_id is None else (model.bos_token_id,)))
    if any(not 0 <= token < 1 << 31 for token in ids):
        yield f"token ids {list(ids)} of begin and end, expected none below 0 and none beyond 31 bits"


def _faults_of_graphs(manifest: Manifest) -> Iterator[str]:
    """What the list of a graph's inputs and outputs says is what the model's dimensions and the split say."""
    model, cycle = manifest.model, manifest.cycle
    layers = {
        contract.FULL_PASS: {*range(model.num_layers)},
        contract.THINKING: {*cycle.encoding_range, *cycle.thinking_range},
        contract.LATE_DECODE: {*cycle.encoding_range, *cycle.decoding_range},
    }
    widths = {contract.LOGITS: model.vocab_size, contract.THOUGHT: model.hidden_size}
    for graph in manifest.graphs:
        if graph.slots < 1 or graph.file != contract.graph_file(graph.name, graph.dialect, graph.slots):
            yield f"graph file {graph.file} for {graph.name}, {graph.dialect}, {graph.slots} slot(s)"
        for side in (graph.inputs, graph.outputs):
            caches = {name.layer for info in side if (name := contract.cache_name(info.name))}
            if caches != layers.get(graph.name, set()):
                yield f"{graph.file} keeps caches of layers {sorted(caches)}, which the split does not say"
        for info in (*graph.inputs, *graph.outputs):
            if info.dtype not in DTYPE_BYTES or any(
                isinstance(dim, int) and not 0 < dim < 1 << 31 for dim in info.dims
            ):
                yield f"{graph.file}: {info.name} is {info.dtype} {list(info.dims)}"
            elif contract.cache_name(info.name) and (
                info.dims[1:] != (model.num_kv_heads, "capacity", model.head_dim) or info.dtype != model.dtype
            ):
                yield f"{graph.file}: {info.name} is {info.dtype} {list(info.dims)}, which the model's dimensions do not say"
            elif info.name in widths and info.dims[-1:] != (widths[info.name],):
                yield f"{graph.file}: {info.name} is {list(info.dims)}, expected to end in {widths[info.name]}"
        if unknown := [name for name in graph.weights if name.partition("+")[0] not in manifest.weights]:
            yield f"{graph.file} reads {unknown[0]}, which is not among the weights"
