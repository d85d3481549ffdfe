"""Which weights of a bundle are quantised, and how: from the options' formats by group to blocks of single matrices.

Groups: ``thinking`` (T), ``late`` (E and D, which run for every token), ``lm_head`` and ``embedding``; a tied lm_head is the
embedding. Matrices alone are quantised; norms, biases and rotary tables stay floats. ``weights`` writes what is made here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from dmtd_export.bundle.rounding import rounded, rounded_to_float8
from dmtd_export.bundle.split import cycle_of
from dmtd_export.errors import ExportError
from dmtd_export.options import CALIBRATED_FORMATS, GROUPS, ExportOptions, WeightFormat, WeightGroup, WeightOptions
from dmtd_models.checkpoints.blocks import BLOCK_SIZES, BlockWeight
from dmtd_models.checkpoints.protocol import Checkpoint
from dmtd_models.checkpoints.tensors import tensor_shapes
from dmtd_models.config.model import DmtdSpec
from dmtd_runtime.bundle import speed_bound

Array = np.ndarray
BITS: dict[WeightFormat, Literal[4, 8]] = {"int4": 4, "int4-symmetric": 4, "int8": 8, "int8-channel": 8, "fp8": 8}
CHANGED: WeightFormat = "int8"
KEPT_BYTES = 3  # of two weights, at most: 8 bits, and two floats for a block of 16
_GROUPS: dict[str | None, WeightGroup] = {
    "encoding": "late",
    "thinking": "thinking",
    "decoding": "late",
    "embedding": "embedding",
}


class MatrixSource(Protocol):
    """What gives a tensor as floats, and in the blocks it is stored in: any checkpoint."""

    def read(self, name: str) -> Array: ...
    def blocks(self, name: str) -> BlockWeight | None: ...


class BlockSource(Protocol):
    """What has some matrices in blocks."""

    def blocks(self, name: str) -> BlockWeight | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """The format of every matrix that is quantised, by its name, and the inputs that share a scale.

    ``made``: matrices that were rounded before, over a calibration text.
    """

    formats: dict[str, WeightFormat]
    block: int
    made: BlockSource | None = None

    def over_text(self, name: str) -> bool:
        """Whether a matrix is in a format that a calibration text bears on."""
        return self.formats.get(name) in CALIBRATED_FORMATS

    def blocks(self, source: MatrixSource, name: str) -> BlockWeight | None:
        """A matrix in its format; None where it stays a float."""
        fmt = self.formats.get(name)
        if fmt is None or fmt == "keep":
            return None if fmt is None else source.blocks(name)
        if fmt == "fp8":
            return rounded_to_float8(source.read(name))
        if self.made is not None and (made := self.made.blocks(name)) is not None:
            return made
        assert fmt != "int8-channel", "it is rounded over a text, without which no export begins"
        return rounded(source.read(name), BITS[fmt], self.block, symmetric=fmt == "int4-symmetric")

    def stored_bytes(self, name: str, count: int, itemsize: int) -> int:
        """Bytes that ``count`` values take: floats of ``itemsize`` bytes, or blocks with half-precision scales and minimums."""
        fmt = self.formats.get(name)
        if fmt is None or fmt == "keep":
            return count * itemsize if fmt is None else count * KEPT_BYTES // 2
        if fmt == "int8-channel":
            return count + count // 16  # its scales and factors, of matrices that are not narrow
        return count * BITS[fmt] // 8 + count // self.block * (4 if fmt == "int4" else 2)


NOTHING = Quantisation(formats={}, block=BLOCK_SIZES[-1])


def resolved_formats(checkpoint: Checkpoint, options: ExportOptions) -> WeightOptions:
    """The formats with what takes the place of none: a quantised checkpoint's own, where the graphs asked for take blocks.

    Raises:
        ExportError: blocks are to be kept of a checkpoint that has none.
    """
    formats = options.formats
    quantised = any(checkpoint.was_in_blocks(name) for name in checkpoint.names())
    given = ("weights", *(f"weights_{group}" for group in GROUPS))
    if not quantised and (keeps := [name for name in given if getattr(formats, name) == "keep"]):
        raise ExportError(
            f"got keep, and {checkpoint.path} is not quantised; choose int8, int4, int4-symmetric or float",
            param=keeps[0],
        )
    if formats.weights is not None:
        return formats
    kept = quantised and options.target in (None, "onnxruntime") and options.dtype == "float32"
    return replace(formats, weights="keep" if kept else "float")


def plan_quantisation(checkpoint: Checkpoint, dmtd: DmtdSpec, options: WeightOptions) -> Quantisation:
    """What the options make of a model's matrices.

    A matrix that an adapter changed is in its blocks no longer: where they were to be kept, it is rounded to ``CHANGED``.

    Raises:
        ExportError: a block that does not divide a matrix, or two formats for one tied matrix.
    """
    config = checkpoint.config
    if config.tie_word_embeddings and options.format_of("lm_head") != options.format_of("embedding"):
        if options.format_of("lm_head") == "int8-channel":  # which the embedding cannot have, so nor can both
            raise ExportError(
                "got int8-channel, expected another format: lm_head is tied to the embedding, which is looked up in blocks; "
                "give --weights-lm-head int8 --weights-embedding int8",
                param="weights_lm_head",
            )
        raise ExportError(
            f"got {options.format_of('lm_head')} with {options.format_of('embedding')} for the embedding, expected one format: "
            "lm_head is tied to the embedding; give --weights-lm-head and --weights-embedding the same",
            param="weights_lm_head",
        )
    formats: dict[str, WeightFormat] = {}
    for name, shape in tensor_shapes(config).items():
        fmt = options.format_of(group_of(name, dmtd))
        if fmt == "keep" and checkpoint.block_source(name) is None:
            fmt = CHANGED if checkpoint.was_in_blocks(name) else "float"
        if len(shape) != 2 or fmt == "float":
            continue
        if fmt not in ("keep", "int8-channel", "fp8") and shape[1] % options.weights_block:
            tied = config.tie_word_embeddings and group_of(name, dmtd) == "embedding"
            groups = ("lm_head", "embedding") if tied else (group_of(name, dmtd),)
            fitting = [block for block in BLOCK_SIZES if shape[1] % block == 0]
            ways = [f"--weights-block {fitting[-1]}"] if fitting else []
            ways.append(" ".join(f"--weights-{group.replace('_', '-')} float" for group in groups))
            raise ExportError(
                f"{name} has {shape[1]} inputs, expected a multiple of the block of {options.weights_block}; "
                f"give {', or '.join(ways)}",
                param="weights_block",
            )
        formats[name] = fmt
    return Quantisation(formats=formats, block=options.weights_block)


def group_of(name: str, dmtd: DmtdSpec) -> WeightGroup:
    """The group of formats that a weight belongs to."""
    return _GROUPS.get(speed_bound.group_of(name, cycle_of(dmtd)), "lm_head")
