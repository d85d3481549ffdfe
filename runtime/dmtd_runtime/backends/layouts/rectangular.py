"""Rows for the standard dialect: [batch, rows], windows padded on the right to the longest.

Padding is written above the committed rows and overwritten before anything sees it. A slot that takes no part is all padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmtd_runtime.backends.base import PREFILL_ROUNDING, Array, Rows, SlotStep, rounded_rows
from dmtd_runtime.bundle import contract


class RectangularLayout:
    """Fills standard graphs for ``slots`` sequences, the batch of every run."""

    def __init__(self, slots: int, max_rows: int = PREFILL_ROUNDING[-1]) -> None:
        """``max_rows``: no chunk is padded beyond."""
        self._slots, self._max_rows = slots, max_rows

    def split(self, steps: Sequence[SlotStep]) -> Sequence[Sequence[SlotStep]]:
        """Heads and prompts apart: whoever takes few rows would be padded to the longest chunk."""
        prompts = [step for step in steps if step.step.kind == "prefill"]
        others = [step for step in steps if step.step.kind != "prefill"]
        return [part for part in (others, prompts) if part]

    def batch_slots(self, graph: contract.GraphName, steps: Sequence[SlotStep]) -> range:
        return range(self._slots)

    def late_offsets(self, parts: Sequence[Sequence[SlotStep]]) -> Sequence[int]:
        return [0] * len(parts)  # every part goes through T by itself

    def sizes(self, graph: contract.GraphName, steps: Sequence[SlotStep], rows: Rows = "last") -> Mapping[str, int]:
        window, late = max(len(s.step.window) for s in steps), max(len(s.step.late) for s in steps)
        if steps[0].step.kind == "prefill":
            window = late = max(window, min(rounded_rows(window), self._max_rows))
        if graph == contract.THINKING:
            return {"batch": self._slots, "window_len": window, "late_len": late}
        num_logits = late if rows == "all" else 1
        if graph == contract.LATE_DECODE:
            return {"batch": self._slots, "late_len": late, "num_logits": num_logits}
        return {"batch": self._slots, "window_len": window, "late_len": late, "num_logits": num_logits}

    def fill(
        self, graph: contract.GraphName, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]
    ) -> None:
        late_only = graph == contract.LATE_DECODE
        first = np.array(fed[: self._slots], np.int64)
        late_first = first.copy()
        ids = arrays[contract.INPUT_IDS]
        ids[:] = 0
        for s in steps:
            own = s.late_ids if late_only else s.ids
            ids[s.slot, : len(own)] = own
            first[s.slot] = (s.step.late if late_only else s.step.window).start
            late_first[s.slot] = s.step.late.start
        arrays[contract.POSITION_IDS][:] = first[:, None] + np.arange(ids.shape[1])
        if not late_only:
            arrays[contract.write_indices("thinking")][:] = first
            late_rows = arrays[contract.LATE_ROWS]
            late_rows[:] = 0
            for s in steps:
                skipped = len(s.step.window) - len(s.step.late)
                late_rows[s.slot, : len(s.step.late)] = range(skipped, skipped + len(s.step.late))
        if graph != contract.THINKING:
            arrays[contract.write_indices("late")][:] = late_first
            self._fill_gates(arrays, steps)

    def logit_index(self, steps: Sequence[SlotStep], rows: Rows = "last") -> Any:
        wanting = [s for s in steps if s.step.wants_logits]
        if rows == "last":
            return [s.slot for s in wanting], 0
        slots = np.repeat([s.slot for s in wanting], [len(s.step.late) for s in wanting])
        return slots, np.concatenate([np.arange(len(s.step.late)) for s in wanting])

    def _fill_gates(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep]) -> None:
        hidden, thought, logit_rows = (
            arrays[name] for name in (contract.GATE_HIDDEN, contract.GATE_THOUGHT, contract.LOGIT_ROWS)
        )
        hidden[:], thought[:] = True, False
        for s in steps:
            count = len(s.step.late)
            hidden[s.slot, :count], thought[s.slot, :count] = s.step.gate_hidden, s.step.gate_thought
            # One row is the last; more are as many as there are.
            room = logit_rows.shape[1]
            logit_rows[s.slot] = count - 1 if room == 1 else np.minimum(np.arange(room), count - 1)
