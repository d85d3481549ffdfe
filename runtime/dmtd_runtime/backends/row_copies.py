"""Rows of caches in device memory, to the host and back: ``RowCopies``, for a prefix cache.

Rows of one slot lie in pieces, one a layer, kind and head. A piece of scratch memory takes them together, so that one copy
crosses to the host, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmtd_runtime.device.base import Address, Array, DeviceMemory

SCRATCH_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """Every cache is [slots, heads, capacity, row_bytes]."""

    heads: int
    capacity: int
    row_bytes: int


class RowCopies:
    """Copies between slots of caches on a device and arrays uint8 [caches, heads, rows, row_bytes].

    ``caches``: their addresses. Scratch memory is taken at the first copy.
    """

    def __init__(self, device: DeviceMemory, layout: CacheLayout, caches: Sequence[int]) -> None:
        self._device, self._layout, self._caches = device, layout, caches
        self._scratch: tuple[Address, Array] | None = None

    def read_rows(self, slot: int, rows: range) -> list[Array]:
        """Copies of ``rows.step`` rows of a slot at a time, once everything enqueued before has run."""
        layout, caches = self._layout, self._caches
        found: list[Array] = []
        assert rows.step <= SCRATCH_ROWS, f"copies of {rows.step} rows, there is room for {SCRATCH_ROWS}"
        together = SCRATCH_ROWS // rows.step  # copies that cross at once
        for first in range(0, len(rows), together):
            crossing = rows[first : first + together]
            count = len(crossing) * rows.step
            scratch, host = self._room(len(caches), count)
            for cache, piece in self._pieces(scratch, slot, crossing.start, count):
                self._copy(piece, cache, count, to_scratch=True)
            self._device.download(host, scratch)
            self._device.wait(self._device.mark())
            values = host.reshape(len(caches), layout.heads, count, layout.row_bytes)
            found += [part.copy() for part in np.split(values, len(crossing), axis=2)]
        return found

    def write_rows(self, slot: int, first: int, values: Array) -> None:
        """Put one of what :meth:`read_rows` gave into a slot, behind everything enqueued before."""
        for start in range(0, values.shape[2], SCRATCH_ROWS):
            part = values[:, :, start : start + SCRATCH_ROWS]
            scratch, host = self._room(len(part), part.shape[2])
            host[:] = part.reshape(-1)
            self._device.upload(scratch, host)
            for cache, piece in self._pieces(scratch, slot, first + start, part.shape[2]):
                self._copy(cache, piece, part.shape[2], to_scratch=False)
            self._device.wait(self._device.mark())  # the host's memory is taken again

    def _room(self, caches: int, rows: int) -> tuple[Address, Array]:
        layout = self._layout
        if self._scratch is None:
            size = caches * layout.heads * SCRATCH_ROWS * layout.row_bytes
            self._scratch = self._device.alloc(size, "copies of cached prefixes"), self._device.alloc_host(size)
        address, host = self._scratch
        return address, host[: caches * layout.heads * rows * layout.row_bytes]

    def _pieces(self, scratch: Address, slot: int, first: int, count: int) -> list[tuple[Address, Address]]:
        """(address of the first row in the cache, its place in the scratch memory) of every cache."""
        layout = self._layout
        slot_bytes = layout.heads * layout.capacity * layout.row_bytes
        piece = layout.heads * count * layout.row_bytes
        return [
            (Address(cache + slot * slot_bytes + first * layout.row_bytes), Address(scratch + index * piece))
            for index, cache in enumerate(self._caches)
        ]

    def _copy(self, target: Address, source: Address, count: int, *, to_scratch: bool) -> None:
        layout = self._layout
        wide, narrow = layout.capacity * layout.row_bytes, count * layout.row_bytes
        self._device.copy(
            target,
            source,
            row_bytes=narrow,
            rows=layout.heads,
            target_pitch=narrow if to_scratch else wide,
            source_pitch=wide if to_scratch else narrow,
        )
