"""Many small arrays in one block of memory: one upload or download moves them all, and each has a fixed aligned place.

The same layout lies over a device's block (addresses) and over the page-locked host memory it is filled from (arrays).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmtd_runtime.bundle.manifest import DTYPE_BYTES
from dmtd_runtime.device.base import Address, Array, aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One array of a block."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """Where each array of a block stands."""

    regions: Mapping[str, Region]
    num_bytes: int

    @classmethod
    def of(cls, arrays: Iterable[tuple[str, Sequence[int], str]]) -> BlockLayout:
        """Arrays (name, shape, dtype) one behind another, each at an aligned offset."""
        regions: dict[str, Region] = {}
        offset = 0
        for name, shape, dtype in arrays:
            assert name not in regions, f"{name} stands in the block already"
            regions[name] = Region(offset=offset, shape=tuple(shape), dtype=dtype)
            offset += aligned(regions[name].num_bytes)
        return cls(regions=regions, num_bytes=offset)

    def views(self, memory: Array) -> dict[str, Array]:
        """The arrays over host memory, uint8 of at least ``num_bytes``."""
        return {
            name: memory[region.offset : region.offset + region.num_bytes]
            .view(np.dtype(region.dtype))
            .reshape(region.shape)
            for name, region in self.regions.items()
        }

    def address(self, base: Address, name: str) -> Address:
        """The address of an array in the device's block at ``base``."""
        return Address(base + self.regions[name].offset)
