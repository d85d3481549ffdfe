"""What a bundle's weights file says, read by the manifest alone: floats as they stand, quantised weights by their formula.

The oracle's reading of quantised weights, written from ``BlockFormat``'s definition and sharing nothing with what wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.bundle.weights import CHUNK_BYTES, map_tensor
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest

Array = np.ndarray[Any, np.dtype[Any]]


def stored_weight(directory: Path, manifest: Manifest, name: str) -> Array:
    """One weight [out, in] (a norm: [hidden]): mapped where it is stored as floats, else float32."""
    if name not in manifest.quantised:
        return map_tensor(directory / contract.WEIGHTS_FILE, manifest.weights[name])
    return np.concatenate([values for values, _, _ in quantised_rows(directory, manifest, name)])


def quantised_rows(directory: Path, manifest: Manifest, name: str) -> Iterator[tuple[Array, Array, Array]]:
    """A quantised weight in runs of rows: values float32 [rows, in], codes uint8 and scales float32 of the same shape."""
    fmt = manifest.quantised[name]
    codes, scales, *minimums = (
        map_tensor(directory / contract.WEIGHTS_FILE, manifest.weights[part]) for part in manifest.parts_of(name)
    )
    middle = 2 ** (fmt.bits - 1)
    lowest = middle - fmt.levels // 2 if fmt.minimums else middle
    step = max(1, CHUNK_BYTES // (8 * codes.shape[1] * fmt.block))
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        own = np.array(codes[rows])
        if fmt.bits == 4:
            pairs = np.empty((*own.shape, 2), np.uint8)
            pairs[..., 0], pairs[..., 1] = own % 16, own // 16
            own = pairs.reshape(*own.shape[:2], fmt.block)
        scale = scales[rows].astype(np.float32)[..., None]
        values = scale * (own.astype(np.float32) - np.float32(lowest))
        if fmt.minimums:
            values += minimums[0][rows].astype(np.float32)[..., None]
        flat = (len(own), -1)
        yield values.reshape(flat), own.reshape(flat), np.broadcast_to(scale, own.shape).reshape(flat)
