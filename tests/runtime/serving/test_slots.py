"""Slots have one owner at a time, told apart by generation."""

from __future__ import annotations

import pytest

from dmtd_runtime.cycle import Position
from dmtd_runtime.serving.slots import Slots


def test_slots_are_taken_from_the_lowest_on_and_told_apart_by_generation() -> None:
    slots = Slots(2)
    first = slots.take(Position(prompt_len=1))
    assert (first.slot, slots.num_free) == (0, 1)
    slots.free(first)
    second = slots.take(Position(prompt_len=1))
    assert second.slot == 0
    assert second.generation > first.generation
    assert slots.holds(second)
    assert not slots.holds(first)
    with pytest.raises(AssertionError, match="is not generation"):
        slots.free(first)
