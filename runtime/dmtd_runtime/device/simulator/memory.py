"""What the simulator remembers of an allocation, and the error for a broken rule. The rules are ``device.py``'s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

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
    gaps: dict[int, dict[int, int]] = field(default_factory=dict)  # of them, where a slot wrote behind rows left out
    fresh: bool = False  # zeroed whole, so no row of a cache is in use


class SimulatedStream(Protocol):
    """What engines need of the device that they run on; the device itself keeps the rules."""

    @property
    def capturing(self) -> bool: ...

    def push(self, work: Callable[[], None]) -> None: ...

    def stall(self) -> None: ...

    def forbid_in_capture(self, what: str) -> None: ...

    def tensor(self, address: int, num_bytes: int, what: str) -> tuple[Block, slice]: ...

    def require_written(self, block: Block, span: slice, what: str) -> None: ...
