"""The records of a bundle's manifest, and what they say of themselves: pure data and arithmetic, checked by ``manifest``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dmtd_errors.pointers import lfs_pointer
from dmtd_errors.words import counted
from dmtd_runtime.bundle import contract
from dmtd_runtime.errors import BundleError

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "bool": 1,
}
HASH_CHUNK_BYTES = 1 << 22
CALIBRATED = "calibrated"  # source of blocks that were rounded over a calibration text
PAGE_BYTES = 4096  # what groups of weights are aligned to


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Dimensions of the decoder. ``max_window`` is the longest window a graph accepts: KV capacity must leave room for it.

    ``dtype``: of computation and float weights. ``kv_dtype``: of caches; None, in bundles of before, for the same.
    """

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
    kv_dtype: Literal["float32", "float16", "bfloat16", "int8", None] = None

    @property
    def cache_dtype(self) -> str:
        """The type of keys and values in caches."""
        return self.kv_dtype or self.dtype


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
    trained_for: str | None = (
        None  # another split, cycle length or convention, where that is so: not ``dmtd_trained`` then
    )

    @property
    def training(self) -> str:
        """What the weights were trained for, and what that means here."""
        if self.dmtd_trained:
            return "trained for DMTD"
        otherwise = f"trained for {self.trained_for}, not for this" if self.trained_for else "not trained for DMTD"
        return f"{otherwise}: speed is real, words of the late steps are not"

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
class BlockFormat:
    """How a quantised weight [out, in] stands in the weights file: blocks of ``block`` inputs, a code of ``bits`` for each.

    A value is ``scale * (code - 2 ** (bits - 1))``; with minimums, of a format of ``levels`` codes whose middle was moved to
    the container's, ``scale * (code - 2 ** (bits - 1) + levels / 2) + minimum``. Two codes of 4 bits share a byte, the lower
    half first. With ``factors``, one for each input, a value is ``scale * (code - 128) * factor`` and a block all of an output's
    inputs: their product with rows that are rounded to int8 is one of whole numbers. ``source``: the format that it came from
    ("Q4_1", "rtn", "search"; "calibrated": rounded over a text).

    ``codes`` float8_e4m3fn: a code is a float of that type, a row one block, and a value ``scale * code``. ``zeros``: every
    minimum of 4 bits is minus its scale times a whole number, so that a code stands for zero, as GPTQ and AWQ have it.
    """

    bits: Literal[4, 8]
    block: int
    minimums: bool
    levels: int
    source: str
    factors: bool = False
    codes: Literal["integer", "float8_e4m3fn"] = "integer"
    zeros: bool = False

    @property
    def float8(self) -> bool:
        """Whether codes are floats of 8 bits."""
        return self.codes == "float8_e4m3fn"

    @property
    def code_bytes(self) -> int:
        """Bytes of a block's codes."""
        return self.block * self.bits // 8

    @property
    def name(self) -> str:
        """For people: int4 in blocks of 32 (Q4_1); what an export rounded itself as its options are called."""
        if self.factors:
            return "int8-channel, calibrated"
        if self.float8:
            return "fp8 with a scale for each output"
        if self.source not in ("rtn", "search", CALIBRATED):
            return f"int{self.bits} in blocks of {self.block} ({self.source})"
        alone = "" if self.minimums or self.bits == 8 else "-symmetric"
        over_text = ", calibrated" if self.source == CALIBRATED else ""
        return f"int{self.bits}{alone} in blocks of {self.block}{over_text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationInfo:
    """The text that something of a bundle was measured over: how many tokens, and their SHA-256."""

    num_tokens: int
    sha256: str


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
    quantised: Mapping[str, BlockFormat] = field(default_factory=dict)  # by the weight's name; all others are floats
    calibration: Mapping[str, CalibrationInfo] = field(default_factory=dict)  # by what it bears on: ``weights``, ``kv``

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight, whether it is quantised or not; None if it is not stored."""
        if (fmt := self.quantised.get(name)) is None:
            return self.weights[name].shape if name in self.weights else None
        codes = self.weights.get(contract.block_part(name, contract.CODES))
        return None if codes is None else (codes.shape[0], math.prod(codes.shape[1:2]) * fmt.block)

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a weight consists of: itself, or codes, scales, minimums or factors."""
        if (fmt := self.quantised.get(name)) is None:
            return (name,)
        more = ((contract.MINIMUMS, fmt.minimums), (contract.FACTORS, fmt.factors))
        kinds = (contract.CODES, contract.SCALES, *(kind for kind, has in more if has))
        return tuple(contract.block_part(name, kind) for kind in kinds)

    def read_as(self, part: str, dialect: contract.Dialect) -> tuple[tuple[int, ...], str]:
        """How graphs of a dialect read a stored tensor: its dimensions behind the first, and its type.

        As it stands, but for the codes of blocks in the standard dialect: there they are a matrix of their integers. Floats of 8
        bits are a matrix, and their scales a vector.
        """
        info, fmt = self.weights[part], self.quantised.get(contract.block_part(part, "weight"))
        if fmt is not None and fmt.float8 and self.quantised_weight(part):
            return ((fmt.block,) if part.endswith(f".{contract.CODES}") else ()), info.dtype
        if fmt is None or dialect != contract.STANDARD or not part.endswith(f".{contract.CODES}"):
            return info.shape[1:], info.dtype
        return (math.prod(info.shape[1:2]) * fmt.block,), f"uint{fmt.bits}"

    def quantised_weight(self, part: str) -> str | None:
        """The quantised weight that a stored tensor is a part of; None for one stored as floats."""
        name = contract.block_part(part, "weight")
        return name if name in self.quantised and part in self.parts_of(name) else None

    def bytes_of(self, name: str) -> int:
        """Bytes of a weight in the weights file; 0 if it is not stored."""
        return sum(self.weights[part].length for part in self.parts_of(name) if part in self.weights)

    def table_bytes(self, name: str) -> int:
        """Bytes of a weight as floats of the model's type, whatever it is stored in."""
        return math.prod(self.shape_of(name) or ()) * DTYPE_BYTES[self.model.dtype]

    def graph(self, name: contract.GraphName, dialect: contract.Dialect, slots: int = 1) -> GraphInfo:
        """The graph asked for; BundleError names what the bundle has instead."""
        for graph in self.graphs:
            if (graph.name, graph.dialect, graph.slots) == (name, dialect, slots):
                return graph
        has = ", ".join(graph.file for graph in self.graphs)
        target = "onnxruntime" if dialect == contract.ONNXRUNTIME else "tensorrt"
        raise BundleError(
            f"bundle has no {name} graph in the {dialect} dialect for {counted(slots, 'slot')}, only {has}; "
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
