"""KV buffers of fixed capacity, one pair a layer, updated in place by the graphs. Knows slots and rows, not cycles.

A buffer is ``[slots, kv_heads, capacity, head_dim]`` and never moves. It starts as zeros: rows above the committed length
may be written by padding and are never seen, but they must be finite, because NaN survives a mask.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np

from dmtd_runtime.bundle.contract import KINDS, Kind
from dmtd_runtime.bundle.manifest import DTYPE_BYTES, ModelInfo

Array = np.ndarray[Any, np.dtype[Any]]


class HostKvCache:
    """KV buffers in host memory; pages are committed by the operating system as rows are written.

    Raises MemoryError where the address space does not hold them.
    """

    def __init__(self, model: ModelInfo, slots: int, capacity: int) -> None:
        shape = (slots, model.num_kv_heads, capacity, model.head_dim)
        self._buffers: dict[tuple[int, Kind], Array] = {
            (layer, kind): _lazy_zeros(shape, np.dtype(model.cache_dtype))
            for layer in range(model.num_layers)
            for kind in KINDS
        }

    def buffer(self, layer: int, kind: Kind) -> Array:
        """[slots, kv_heads, capacity, head_dim]."""
        return self._buffers[layer, kind]

    def move(self, source: int, target: int, rows: int) -> None:
        """Copy the first ``rows`` rows of a slot over another slot's."""
        for buffer in self._buffers.values():
            buffer[target, :, :rows] = buffer[source, :, :rows]

    def clear(self, slot: int, rows: int) -> None:
        """Zero the first ``rows`` rows of a slot."""
        for buffer in self._buffers.values():
            buffer[slot, :, :rows] = 0

    def read_rows(self, slot: int, rows: range) -> list[Array]:
        """Copies of ``rows.step`` rows of a slot at a time, [2 * layers, kv_heads, rows.step, head_dim]."""
        some = next(iter(self._buffers.values()))
        shape = (len(self._buffers), some.shape[1], rows.step, some.shape[3])
        found: list[Array] = [np.empty(shape, some.dtype) for _ in rows]
        for index, buffer in enumerate(self._buffers.values()):
            own = buffer[slot]
            for first, copy in zip(rows, found, strict=True):
                copy[index] = own[:, first : first + rows.step]
        return found

    def write_rows(self, slot: int, first: int, values: Array) -> None:
        """Put one of what :meth:`read_rows` gave into a slot, from row ``first`` on."""
        for buffer, part in zip(self._buffers.values(), values, strict=True):
            buffer[slot, :, first : first + part.shape[1]] = part

    def close(self) -> None:
        """Drop the buffers; their memory goes once nothing is bound to them."""
        self._buffers.clear()


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros whose pages exist once written. numpy's own asks for huge pages, which commits 2 MB around every row."""
    count = math.prod(shape)
    try:
        # Private: the default of Python's mmap is memory that a forked child would share and write into.
        pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{count * dtype.itemsize} bytes of cache") from error
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def kv_bytes(model: ModelInfo, rows: int, layers: int | None = None) -> int:
    """Bytes of the keys and values of ``rows`` rows in ``layers`` layers (None: all)."""
    layers = model.num_layers if layers is None else layers
    return 2 * layers * model.num_kv_heads * model.head_dim * rows * DTYPE_BYTES[model.cache_dtype]
