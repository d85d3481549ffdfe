"""The bundle's one weights file: every tensor once, streamed from the checkpoint, with numbers to recognise it by.

Layout: tensors stand in Hugging Face's own form ``[out, in]``; q, k, v and gate, up stand one behind another so that a
graph can read them as one matrix; every group starts at a page. A quantised weight stands as codes, scales and minimums (see
``BlockFormat``), the codes of a group one behind another, then its scales, in half precision where that holds them exactly.
The numbers (``norm``, ``probe``) let `dmtd verify` tell an altered tensor from the exported one without the checkpoint, even
where the file's hash was recomputed. Scales of int8 caches stand behind all else: they are measured over what is there already.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import ml_dtypes
import numpy as np

from dmtd_export.bundle.quantise import NOTHING, MatrixSource, Quantisation
from dmtd_export.errors import ExportError
from dmtd_export.graphs.layers import COS, SIN
from dmtd_models.checkpoints.blocks import BlockWeight
from dmtd_models.config.model import ModelConfig
from dmtd_models.reference.rope import rotary_tables
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import PAGE_BYTES as PAGE_BYTES
from dmtd_runtime.bundle.manifest import BlockFormat, FileInfo, WeightInfo, sha256_of

Array = np.ndarray
CHUNK_BYTES = 32 << 20  # converted at a time: bounds the anonymous memory of an export
PROBE_RTOL = 1e-10  # of the norm; float64 sums in another order stay below 1e-13 of it for 28 million values

NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


class TensorSource(MatrixSource, Protocol):
    """Anything that can be asked for tensors by their Hugging Face name."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What :func:`write_weights` wrote: the stored tensors, the weights that are in blocks, and the file."""

    weights: dict[str, WeightInfo]
    quantised: dict[str, BlockFormat]
    file: FileInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Two numbers of a tensor: its Euclidean norm, and a bilinear form that sees every element and its place."""

    norm: float
    probe: float

    def matches(self, other: Fingerprint) -> bool:
        tolerance = PROBE_RTOL * max(self.norm, other.norm, 1e-30)
        close = abs(self.norm - other.norm) <= tolerance and abs(self.probe - other.probe) <= tolerance
        return close and math.isfinite(tolerance)  # within infinity lies everything


class Fingerprinter:
    """Accumulates a :class:`Fingerprint` over chunks of rows, in float64.

    probe = sum over i, j of u[i] * x[i, j] * v[j], with fixed pseudo-random u and v. Their magnitudes all differ: with mere signs
    two rows of equal sign could change places unseen.
    """

    def __init__(self) -> None:
        self._sum_squares = 0.0
        self._probe = 0.0
        self._row = 0

    def add(self, rows: Array) -> None:
        x = np.asarray(rows, dtype=np.float32).reshape(len(rows), -1).astype(np.float64)
        self._sum_squares += float(np.einsum("ij,ij->", x, x))
        # einsum, not @: a BLAS adds in an order of its own, and equal exports should write equal manifests.
        rows_probe = np.einsum("ij,j->i", x, _factors(1 << 40, x.shape[1]))
        self._probe += float(np.einsum("i,i->", _factors(self._row, len(x)), rows_probe))
        self._row += len(x)

    def finish(self) -> Fingerprint:
        return Fingerprint(norm=self._sum_squares**0.5, probe=self._probe)


def _factors(start: int, count: int) -> Array:
    """Pseudo-random numbers of either sign and magnitude 0.5 to 1, one for each of ``count`` integers; stable for ever."""
    with np.errstate(over="ignore"):
        mixed = np.arange(start, start + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0x94D049BB133111EB)
    magnitude = 0.5 + (mixed & np.uint64((1 << 52) - 1)).astype(np.float64) * 2.0**-53
    return np.where(mixed >> np.uint64(63), magnitude, -magnitude)


def tensor_groups(config: ModelConfig) -> Iterator[tuple[str, ...]]:
    """The stored tensors in file order, in groups that stand one behind another."""
    yield ("model.embed_tokens.weight",)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        yield (f"{layer}.input_layernorm.weight",)
        qkv = [f"{layer}.self_attn.{kind}_proj" for kind in "qkv"]
        yield tuple(f"{name}.weight" for name in qkv)
        if config.qkv_bias:
            yield tuple(f"{name}.bias" for name in qkv)
        if config.qk_norm:
            yield (f"{layer}.self_attn.q_norm.weight",)
            yield (f"{layer}.self_attn.k_norm.weight",)
        yield (f"{layer}.self_attn.o_proj.weight",)
        if config.o_bias:
            yield (f"{layer}.self_attn.o_proj.bias",)
        yield (f"{layer}.post_attention_layernorm.weight",)
        for suffix in ("weight", "bias") if config.mlp_bias else ("weight",):
            yield (f"{layer}.mlp.gate_proj.{suffix}", f"{layer}.mlp.up_proj.{suffix}")
            yield (f"{layer}.mlp.down_proj.{suffix}",)
    yield ("model.norm.weight",)
    if not config.tie_word_embeddings:
        yield ("lm_head.weight",)


def stored_bytes(
    config: ModelConfig, source: TensorSource, dtype: str, rotary_rows: int, quantisation: Quantisation = NOTHING
) -> int:
    """Bytes of all tensors, floats in ``dtype``, both rotary tables of ``rotary_rows`` rows among them, alignment aside."""
    itemsize = NUMPY_DTYPES[dtype].itemsize
    names = [name for group in tensor_groups(config) for name in group]
    counts = [quantisation.stored_bytes(name, int(np.prod(source.shape(name))), itemsize) for name in names]
    return sum(counts) + rotary_rows * config.head_dim * itemsize


def write_weights(
    path: Path,
    source: TensorSource,
    config: ModelConfig,
    dtype: str,
    rotary_rows: int,
    on_bytes: Callable[[int], None] | None = None,
    quantisation: Quantisation = NOTHING,
) -> Written:
    """Stream all tensors of ``source`` into ``path``, those of ``quantisation`` in blocks.

    ``on_bytes`` is told of every chunk, for a progress bar.
    """
    quantised: dict[str, BlockFormat] = {}
    with path.open("wb") as file:
        writer = _WeightsFile(file, on_bytes)
        for group in tensor_groups(config):
            writer.align()
            made = [(name, weight, _format(weight)) for name in group for weight in [quantisation.blocks(source, name)]]
            for fmt, run in itertools.groupby(made, lambda each: each[2]):
                if fmt is None:
                    for name, _, _ in run:
                        writer.write(name, dtype, source.read(name))
                    continue
                in_blocks = {name: weight for name, weight, _ in run if weight is not None}
                _write_blocks(writer, in_blocks)
                quantised |= dict.fromkeys(in_blocks, fmt)
        for name, table in zip((COS, SIN), rotary_tables(config.rope, config.head_dim, rotary_rows), strict=True):
            writer.align()
            writer.write(name, dtype, table)
        file.flush()
        written = FileInfo(bytes=writer.offset, sha256=writer.digest.hexdigest())
        return Written(weights=writer.infos, quantised=quantised, file=written)


def append_weights(path: Path, written: Written, tensors: Mapping[str, Array], dtype: str) -> Written:
    """Write further tensors behind those of a file, from a page's beginning on."""
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        writer = _WeightsFile(file, None, offset=written.file.bytes)
        writer.align()
        for name, tensor in tensors.items():
            writer.write(name, dtype, tensor)
    info = FileInfo(bytes=writer.offset, sha256=sha256_of(path))
    return replace(written, weights={**written.weights, **writer.infos}, file=info)


def _format(weight: BlockWeight | None) -> BlockFormat | None:
    if weight is None:
        return None
    minimums = weight.minimums is not None
    levels = weight.levels if minimums else 1 << weight.bits
    bits: Literal[4, 8] = 4 if weight.bits == 4 else 8
    return BlockFormat(
        bits=bits,
        block=weight.block,
        minimums=minimums,
        levels=levels,
        source=weight.source,
        factors=weight.factors is not None,
        codes="float8_e4m3fn" if weight.float8 else "integer",
        zeros=weight.has_zero_points,
    )


def _write_blocks(writer: _WeightsFile, weights: Mapping[str, BlockWeight]) -> None:
    """The codes of some weights of one format, then their scales, then their minimums: each kind is read as one matrix. Factors,
    which weights of one input share, stand behind them, each weight's own.
    """
    for name, weight in weights.items():
        kind = "float8_e4m3fn" if weight.float8 else "uint8"
        writer.write(contract.block_part(name, contract.CODES), kind, packed_codes(weight).view(NUMPY_DTYPES[kind]))
    scales = {name: weight.scales for name, weight in weights.items()}
    minimums = {name: weight.minimums for name, weight in weights.items() if weight.minimums is not None}
    for kind, arrays in ((contract.SCALES, scales), (contract.MINIMUMS, minimums)):
        narrow = all(_fits_half(array) for array in arrays.values())
        for name, array in arrays.items():
            writer.write(contract.block_part(name, kind), "float16" if narrow else "float32", array)
    for name, weight in weights.items():
        if weight.factors is not None:
            writer.write(contract.block_part(name, contract.FACTORS), "float32", weight.factors)


def packed_codes(weight: BlockWeight) -> Array:
    """Codes about the container's middle, uint8 [out, blocks, bytes of a block]; of 4 bits the even ones in the lower halves."""
    codes, _ = weight.centred()
    if weight.bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return codes.reshape(*weight.blocks_shape, -1)


def _fits_half(array: Array) -> bool:
    """Whether half precision holds every value as it is."""
    with np.errstate(over="ignore"):
        return bool((array.astype(np.float16).astype(np.float32) == array).all())


class _WeightsFile:
    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], None] | None, offset: int = 0) -> None:
        self.infos: dict[str, WeightInfo] = {}
        self.offset = offset
        self.digest = hashlib.sha256()
        self._file = file
        self._on_bytes = on_bytes

    def align(self) -> None:
        self._put(b"\0" * (-self.offset % PAGE_BYTES))

    def write(self, name: str, dtype: str, tensor: Array) -> None:
        start, fingerprint = self.offset, Fingerprinter()
        for rows in row_chunks(tensor):
            with np.errstate(over="ignore"):  # an overflow shows in the norm
                chunk = np.ascontiguousarray(rows.astype(NUMPY_DTYPES[dtype], copy=False))
            fingerprint.add(chunk)
            self._put(chunk.view(np.uint8).reshape(-1).data)
            if self._on_bytes:
                self._on_bytes(chunk.nbytes)
        numbers = fingerprint.finish()
        if not math.isfinite(numbers.norm):
            damaged = not all(np.isfinite(rows).all() for rows in row_chunks(tensor))
            remedy = "" if damaged else ", or try --dtype bfloat16 or float32"
            raise ExportError(
                f"tensor {name} has values that are not finite in {dtype}: NaN, or too large for the type; "
                f"the checkpoint is damaged{remedy}"
            )
        self.infos[name] = WeightInfo(
            dtype=dtype,
            shape=tuple(tensor.shape),
            offset=start,
            length=self.offset - start,
            norm=numbers.norm,
            probe=numbers.probe,
        )

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def row_chunks(tensor: Array) -> Iterator[Array]:
    """The tensor in slices along axis 0 of at most CHUNK_BYTES as float64."""
    row_bytes = max(1, int(np.prod(tensor.shape[1:]))) * 8
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(tensor), step):
        yield tensor[start : start + step]


def map_tensor(path: Path, info: WeightInfo) -> Array:
    """A read-only view of one tensor in the weights file."""
    return np.memmap(path, dtype=NUMPY_DTYPES[info.dtype], mode="r", offset=info.offset, shape=info.shape)


def fingerprint_of(tensor: Array) -> Fingerprint:
    """The fingerprint of a whole tensor."""
    fingerprinter = Fingerprinter()
    for rows in row_chunks(tensor):
        fingerprinter.add(rows)
    return fingerprinter.finish()
