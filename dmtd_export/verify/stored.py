"""What a bundle's weights file says, read by the manifest alone: floats as they stand, quantised weights by their formula.

The oracle's reading of quantised weights, written from ``BlockFormat``'s definition and sharing nothing with what wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.bundle.weights import map_tensor
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest

Array = np.ndarray[Any, np.dtype[Any]]
RUN_BYTES = 1 << 20  # of values made at a time: what a core's cache holds


def stored_weight(directory: Path, manifest: Manifest, name: str) -> Array:
    """One weight [out, in] (a norm: [hidden]): mapped where it is stored as floats, else float32."""
    if name not in manifest.quantised:
        return map_tensor(directory / contract.WEIGHTS_FILE, manifest.weights[name])
    blocks, shape = _Blocks(directory, manifest, name), manifest.shape_of(name)
    assert shape is not None, f"{name} is stored"
    found: Array = np.empty(shape, np.float32)
    for rows in blocks.runs():
        blocks.write_values(rows, found[rows])
    return found


def quantised_rows(directory: Path, manifest: Manifest, name: str) -> Iterator[tuple[Array, Array, Array]]:
    """A quantised weight in runs of rows: values float32 [rows, in], codes uint8 and scales float32 of the same shape."""
    blocks = _Blocks(directory, manifest, name)
    for rows in blocks.runs():
        codes = blocks.codes_of(rows)
        values = np.empty((len(codes), codes[0].size), np.float32)
        blocks.write_values(rows, values)
        scales = np.repeat(blocks.scales[rows].astype(np.float32), blocks.format.block, axis=1)
        if blocks.factors is not None:
            scales *= blocks.factors
        yield values, codes.reshape(values.shape), scales


def float8(codes: Array) -> Array:
    """Values of bytes as floats of 8 bits, e4m3fn: a sign, 4 bits of exponent, 3 of eighths behind a 1 that exponent 0 lacks."""
    exponents = np.maximum(codes >> 3 & 15, 1).astype(np.int32)
    eighths = (codes & 7).astype(np.int32) + np.where(codes & 0x78, 8, 0)
    sizes = np.ldexp(eighths.astype(np.float32), exponents - 10)
    signed: Array = np.where(codes & 0x80, -sizes, sizes)
    return signed


class _Blocks:
    """The stored parts of a quantised weight, mapped."""

    def __init__(self, directory: Path, manifest: Manifest, name: str) -> None:
        self.format = manifest.quantised[name]
        self._codes, self.scales, *more = (
            map_tensor(directory / contract.WEIGHTS_FILE, manifest.weights[part]) for part in manifest.parts_of(name)
        )
        self._minimums = more[0] if self.format.minimums else None
        self.factors = more[0] if self.format.factors else None

    def runs(self) -> Iterator[slice]:
        """Rows that are read at a time."""
        step = max(1, RUN_BYTES // (4 * self._codes.shape[1] * self.format.block))
        return (slice(start, start + step) for start in range(0, len(self._codes), step))

    def codes_of(self, rows: slice) -> Array:
        """Codes uint8 [rows, blocks, block], one a value."""
        own = np.array(self._codes[rows]).view(np.uint8)
        if self.format.bits == 8:
            return own
        pairs = np.empty((*own.shape, 2), np.uint8)
        pairs[..., 0], pairs[..., 1] = own % 16, own // 16
        return pairs.reshape(*own.shape[:2], self.format.block)

    def write_values(self, rows: slice, out: Array) -> None:
        """Write the values of some rows into ``out`` float32 [rows, in]: ``BlockFormat``'s formula, operation by operation."""
        fmt = self.format
        if fmt.float8:
            np.multiply(float8(self.codes_of(rows)[:, 0]), self.scales[rows].astype(np.float32), out=out)
            return
        middle = 2 ** (fmt.bits - 1)
        lowest = middle - fmt.levels // 2 if fmt.minimums else middle
        values = out.reshape(len(out), -1, fmt.block)
        np.subtract(self.codes_of(rows), np.float32(lowest), out=values, dtype=np.float32)
        values *= self.scales[rows].astype(np.float32)[..., None]
        if self._minimums is not None:
            values += self._minimums[rows].astype(np.float32)[..., None]
        if self.factors is not None:
            values *= self.factors
