"""Steps that belong to no sequence: to warm a GPU up, and to see whether captured graphs give what plain launches give."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from dmtd_runtime.backends.base import PREFILL_ROUNDING, Array, SlotStep
from dmtd_runtime.cycle import Step

TOLERANCE = 2.0**-6  # of the largest logit: a stale length is far off, another order of sums is not


def trial_step(window_len: int, last: int, slot: int = 0, *, prefill: bool = False) -> SlotStep:
    """A step that ends at position ``last``: late for ``window_len`` 0, else a full pass or a chunk of a prompt."""
    window = range(last - window_len + 1, last + 1) if window_len else range(0)
    late = window if prefill else range(last, last + 1)
    step = Step(
        kind="prefill" if prefill else "full" if window_len else "late",
        window=window,
        late=late,
        gate_hidden=(True,) * len(late),
        gate_thought=(bool(window_len),) * len(late),
        wants_logits=True,
    )
    return SlotStep(slot=slot, step=step, ids=[0] * max(len(window), len(late)))


def captures_agree(run: Callable[[SlotStep, bool], Array], cycle_length: int, capacity: int) -> bool:
    """Whether ``run(step, captured)`` gives the same logits either way, also when a capture is replayed at another length."""
    ends = sorted({cycle_length - 1, min(2 * cycle_length - 1, capacity - 1)})
    steps = [trial_step(cycle_length, last) for last in ends]
    steps += [trial_step(0, last) for last in range(ends[-1], min(ends[-1] + 2, capacity))]
    for step in steps:
        got, expected = run(step, True), run(step, False)
        allowed = TOLERANCE * float(np.abs(np.nan_to_num(expected)).max(initial=0.0))
        if not np.allclose(got, expected, rtol=0.0, atol=allowed, equal_nan=True):
            return False
    return True


def warm_up_steps(cycle_length: int, slots: int, max_rows: int) -> Iterator[list[SlotStep]]:
    """Every shape that generation meets again and again: prompts by their rounded rows, then steps by their batch."""
    for rows in (rows for rows in PREFILL_ROUNDING if rows <= max_rows):
        yield [trial_step(rows, rows - 1, prefill=True)]
    for count in range(1, slots + 1):
        for window_len in sorted({0, 1, cycle_length}):
            yield [trial_step(window_len, cycle_length - 1, slot) for slot in range(count)]
