"""Tables of a bundle as floats of its type: the stored bytes, or of a table in blocks its values.

An engine looks rows up in an input that holds floats, whatever format the table is stored in (see ``engine_record``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import BlockFormat, Manifest

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

PART_VALUES = 4 << 20  # made of blocks at a time


def table_parts(directory: Path, manifest: Manifest, name: str) -> Iterator[Bytes]:
    """The table's bytes as floats of the bundle's type, in parts that follow one another."""
    stored = [
        np.memmap(directory / contract.WEIGHTS_FILE, np.uint8, "r", offset=info.offset, shape=(info.length,))
        for info in (manifest.weights[part] for part in manifest.parts_of(name))
    ]
    fmt = manifest.quantised.get(name)
    if fmt is None:
        yield stored[0]
        return
    infos = [manifest.weights[part] for part in manifest.parts_of(name)]
    kinds = ["uint8", *(info.dtype for info in infos[1:])]  # numpy has no floats of 8 bits
    codes, *per_block = (
        data.view(kind).reshape(info.shape) for data, kind, info in zip(stored, kinds, infos, strict=True)
    )
    step = max(1, PART_VALUES // (codes.shape[1] * fmt.block))
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        values = _values(fmt, codes[rows], *(each[rows].astype(np.float32)[..., None] for each in per_block))
        yield _rounded(values, manifest.model.dtype).reshape(-1).view(np.uint8)


def _values(fmt: BlockFormat, codes: Bytes, scales: Float32, minimums: Float32 | None = None) -> Float32:
    """[rows, blocks, block] of codes [rows, blocks, bytes] by ``BlockFormat``'s formula."""
    if fmt.float8:
        return scales * _float8()[codes]
    if fmt.bits == 4:
        codes = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1).reshape(*codes.shape[:2], fmt.block)
    middle = (1 << fmt.bits - 1) - (0 if minimums is None else fmt.levels // 2)
    values = scales * (codes.astype(np.float32) - np.float32(middle))
    return values if minimums is None else values + minimums


def _float8() -> Float32:
    """The value of every byte as a float8_e4m3fn: a sign, 4 bits of exponent, 3 of mantissa; no infinities, NaN at the ends."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    size[[0x7F, 0xFF]] = np.nan
    return np.where(byte < 128, size, -size).astype(np.float32)


def _rounded(values: Float32, dtype: str) -> npt.NDArray[np.generic]:
    """To the nearest of the type, to even between two; numpy has no bfloat16: its 16 bits."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32)
    return (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)).astype(np.uint16)
