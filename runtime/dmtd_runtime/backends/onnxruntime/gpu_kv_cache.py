"""The caches of an ONNX Runtime backend on a GPU: what ``HostKvCache`` is on the host."""

from __future__ import annotations

from functools import cached_property

from dmtd_runtime.backends.base import Array
from dmtd_runtime.backends.onnxruntime.memory import Buffer, GpuMemory
from dmtd_runtime.backends.row_copies import CacheLayout, RowCopies
from dmtd_runtime.bundle.contract import KINDS, Kind
from dmtd_runtime.bundle.manifest import DTYPE_BYTES, ModelInfo


class GpuKvCache:
    """A zeroed buffer for each layer's keys and values, [slots, kv_heads, capacity, head_dim], allocated whole."""

    def __init__(self, model: ModelInfo, slots: int, capacity: int, memory: GpuMemory) -> None:
        shape = (slots, model.num_kv_heads, capacity, model.head_dim)
        self._model, self._capacity, self._memory = model, capacity, memory
        self._buffers: dict[tuple[int, Kind], Buffer] = {
            (layer, kind): memory.zeros(shape, model.cache_dtype, f"the cache of layer {layer}")
            for layer in range(model.num_layers)
            for kind in KINDS
        }

    def buffer(self, layer: int, kind: Kind) -> Buffer:
        return self._buffers[layer, kind]

    def clear(self, slot: int, rows: int) -> None:
        """Zero a slot, all ``rows`` and those behind them."""
        for buffer in self._buffers.values():
            self._memory.clear(buffer.rows(slot, 1))

    def move(self, source: int, target: int, rows: int) -> None:
        """Copy the first ``rows`` rows of a slot over another slot's."""
        for buffer in self._buffers.values():
            self._memory.move_rows(buffer, source, target, rows)

    def read_rows(self, slot: int, rows: range) -> list[Array]:
        return self._copies.read_rows(slot, rows)

    def write_rows(self, slot: int, first: int, values: Array) -> None:
        self._copies.write_rows(slot, first, values)

    def close(self) -> None:
        """Drop the buffers; their memory goes with all of the device's."""
        self._buffers.clear()

    @cached_property
    def _copies(self) -> RowCopies:
        """Copies of rows between the caches and the host."""
        row_bytes = self._model.head_dim * DTYPE_BYTES[self._model.cache_dtype]
        layout = CacheLayout(heads=self._model.num_kv_heads, capacity=self._capacity, row_bytes=row_bytes)
        return RowCopies(self._memory.cuda, layout, [buffer.address for buffer in self._buffers.values()])
