"""What the simulator remembers of an allocation, and the error for a broken rule. The rules are ``device.py``'s."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmtd_runtime.device.base import Array


class SeamError(AssertionError):
    """The backend broke a rule of the device; a bug, never the user's fault."""


@dataclass(slots=True, kw_only=True, eq=False)
class Block:
    """One allocation. ``written`` marks every byte that was written since."""

    what: str
    address: int
    data: Array
    written: Array
    rows: dict[int, Array] = field(default_factory=dict)  # KV caches: rows in use of each slot, by offset
    fresh: bool = False  # zeroed whole, so no row of a cache is in use
