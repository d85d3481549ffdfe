"""Slots of a backend's caches, and who lives in them: the one place that knows how many rows of a slot are committed.

A slot carries a generation number that grows with every tenant, so that what was asked for an earlier one is told apart from
what a later one asks. Integers alone: no tensor, no backend.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmtd_runtime.cycle import Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenancy:
    """A slot as one sequence has it."""

    slot: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """The first ``rows`` rows of slot ``source`` go over those of ``target``, which is free."""

    source: int
    target: int
    rows: int


class Slots:
    """``count`` slots, taken from the lowest on."""

    def __init__(self, count: int) -> None:
        self._positions: list[Position | None] = [None] * count
        self._generations = [0] * count

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def committed(self) -> list[int]:
        """Committed rows of every slot; 0 for a free one."""
        return [0 if position is None else position.fed for position in self._positions]

    @property
    def num_free(self) -> int:
        return self._positions.count(None)

    @property
    def lowest_free(self) -> int | None:
        return self._positions.index(None) if self.num_free else None

    def take(self, position: Position) -> Tenancy:
        """The lowest free slot, for a sequence that stands at ``position``."""
        slot = self._positions.index(None)
        self._positions[slot] = position
        self._generations[slot] += 1
        return Tenancy(slot=slot, generation=self._generations[slot])

    def holds(self, tenancy: Tenancy) -> bool:
        """Whether the slot is still the same tenant's."""
        taken = self._positions[tenancy.slot] is not None
        return taken and self._generations[tenancy.slot] == tenancy.generation

    def free(self, tenancy: Tenancy) -> None:
        assert self.holds(tenancy), f"slot {tenancy.slot} is not generation {tenancy.generation}'s"
        self._positions[tenancy.slot] = None

    def move(self, tenancy: Tenancy, target: int) -> tuple[Tenancy, Move]:
        """Let a tenant live in the free slot ``target``: its new tenancy, and what is to be copied."""
        assert self.holds(tenancy) and self._positions[target] is None, "a tenant moves into a free slot"
        position = self._positions[tenancy.slot]
        assert position is not None
        self._positions[target], self._positions[tenancy.slot] = position, None
        self._generations[target] += 1
        move = Move(source=tenancy.slot, target=target, rows=position.fed)
        return Tenancy(slot=target, generation=self._generations[target]), move
