"""KV buffers of fixed capacity, one pair a layer, updated in place by the graphs. Knows slots and rows, not cycles.

A buffer is ``[slots, kv_heads, capacity, head_dim]`` and never moves. It starts as zeros: rows above the committed length
may be written by padding and are never seen, but they must be finite, because NaN survives a mask.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from dmtd_runtime.contract import Kind
from dmtd_runtime.manifest import ModelInfo

Array = np.ndarray[Any, np.dtype[Any]]


class HostKvCache:
    """KV buffers in host memory; pages are committed by the operating system as rows are written."""

    def __init__(self, model: ModelInfo, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        shape = (slots, model.num_kv_heads, capacity, model.head_dim)
        dtype = np.dtype(model.dtype)
        self._buffers: dict[tuple[int, Kind], Array] = {
            (layer, kind): _lazy_zeros(shape, dtype) for layer in range(model.num_layers) for kind in ("key", "value")
        }

    def buffer(self, layer: int, kind: Kind) -> Array:
        """[slots, kv_heads, capacity, head_dim]."""
        return self._buffers[layer, kind]

    def move(self, source: int, target: int, rows: int) -> None:
        """Copy the first ``rows`` rows of a slot over another slot's."""
        for buffer in self._buffers.values():
            buffer[target, :, :rows] = buffer[source, :, :rows]

    def clear(self, slot: int) -> None:
        """Zero a slot: what a failed run left there must not reach the next sequence."""
        for buffer in self._buffers.values():
            buffer[slot] = 0

    def close(self) -> None:
        """Drop the buffers; their memory goes once nothing is bound to them."""
        self._buffers.clear()


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros whose pages exist once written. numpy's own asks for huge pages, which commits 2 MB around every row."""
    pages = mmap.mmap(-1, max(1, int(np.prod(shape)) * dtype.itemsize))
    return np.frombuffer(pages, dtype, count=int(np.prod(shape))).reshape(shape)


def kv_bytes(model: ModelInfo, rows: int) -> int:
    """Bytes of all layers' keys and values for ``rows`` rows."""
    itemsize = 4 if model.dtype == "float32" else 2
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * rows * itemsize
