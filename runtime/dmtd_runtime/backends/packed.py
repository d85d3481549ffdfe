"""Rows for the onnxruntime dialect: T's windows packed slot by slot, late rows as [batch, 1] or [1, rows].

Every attention node takes at least one row. A slot that takes no part but stands before one that does gets one idle row;
slots behind the last active one get zero rows that the graph itself appends and drops (``PAD_ROWS``). Idle rows are written
at the first row that is not committed in any cache of the slot, so nothing ever sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmtd_runtime import contract
from dmtd_runtime.backends.base import Array, SlotStep, rounded_rows


class PackedLayout:
    """Fills graphs made for ``slots`` attention nodes in every packed layer."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    def split(self, steps: Sequence[SlotStep]) -> Sequence[Sequence[SlotStep]]:
        """Prompts one by one: D takes several rows of one sequence only, and a chunk is bound by arithmetic anyway."""
        return [[step] for step in steps] if steps[0].step.kind == "prefill" else [steps]

    def batch_slots(self, steps: Sequence[SlotStep]) -> range:
        """The slots whose caches D's layers see, as one batch."""
        if steps[0].step.kind == "prefill":
            return range(steps[0].slot, steps[0].slot + 1)
        return range(steps[-1].slot + 1)

    def sizes(self, graph: contract.GraphName, steps: Sequence[SlotStep]) -> Mapping[str, int]:
        sizes = {"batch": len(self.batch_slots(steps)), "late_len": 1}
        window = sum(len(s.step.window) for s in steps) + self._idle_rows(steps)
        if steps[0].step.kind == "prefill":
            rows = len(steps[0].step.late)
            sizes["late_len"] = rounded_rows(rows)
            window += sizes["late_len"] - rows
        if graph != contract.LATE_DECODE:
            sizes["window_len"] = window
        if graph != contract.THINKING:
            sizes["num_logits"] = sum(s.step.wants_logits for s in steps)
        return sizes

    def fill(
        self, graph: contract.GraphName, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]
    ) -> None:
        if graph != contract.LATE_DECODE:
            self._fill_window(arrays, steps, fed)
        if graph != contract.THINKING:
            self._fill_late(arrays, steps, fed)
            if graph == contract.LATE_DECODE:
                ids, first = arrays[contract.INPUT_IDS], self.batch_slots(steps).start
                for s in steps:
                    ids[s.slot - first, : len(s.step.late)] = s.late_ids

    def logit_index(self, steps: Sequence[SlotStep]) -> Any:
        return 0

    def _idle_rows(self, steps: Sequence[SlotStep]) -> int:
        """Rows of slots that stand before the last active one and take no part."""
        return steps[-1].slot + 1 - len(steps) if self._slots > 1 else 0

    def _fill_window(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]) -> None:
        packed_ids, late_rows = arrays[contract.INPUT_IDS][0], arrays[contract.LATE_ROWS]
        seqlens = arrays[contract.seqlens_k("thinking")]
        totals = arrays[contract.total_sequence_length("thinking")]
        # Rows that round a prefill up belong to the last active slot.
        extra = len(packed_ids) - sum(len(s.step.window) for s in steps) - self._idle_rows(steps)
        counts = arrays[contract.SLOT_ROWS] if self._slots > 1 else None
        if counts is not None:
            counts[:] = 1
            seqlens[:] = fed[: self._slots]
            totals[:] = seqlens + 1
            arrays[contract.PAD_ROWS][0] = self._slots - steps[-1].slot - 1
        row, next_slot, first = 0, 0, self.batch_slots(steps).start
        for s in steps:
            row += s.slot - next_slot if self._slots > 1 else 0
            next_slot = s.slot + 1
            stop = s.step.window.stop + (extra if s is steps[-1] else 0)
            seqlens[s.slot], totals[s.slot] = stop - 1, stop
            if counts is not None:
                counts[s.slot] = stop - s.step.window.start
            packed_ids[row : row + len(s.ids)] = s.ids
            row += len(s.step.window)
            late = len(s.step.late)
            late_rows[s.slot - first, :late] = range(row - late, row)

    def _fill_late(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]) -> None:
        hidden, thought = arrays[contract.GATE_HIDDEN], arrays[contract.GATE_THOUGHT]
        seqlens = arrays[contract.seqlens_k("late")]
        slots, rows = self.batch_slots(steps), hidden.shape[1]
        hidden[:], thought[:] = True, False
        for batch_row, slot in enumerate(slots):
            seqlens[batch_row] = fed[slot] + rows - 1
        arrays[contract.total_sequence_length("late")][0] = seqlens.max() + 1
        wanted = []
        for s in steps:
            batch_row, count = s.slot - slots.start, len(s.step.late)
            hidden[batch_row, :count], thought[batch_row, :count] = s.step.gate_hidden, s.step.gate_thought
            if s.step.wants_logits:
                wanted.append(batch_row * rows + count - 1)
        arrays[contract.LOGIT_ROWS][:] = wanted
