"""Rows for the onnxruntime dialect: the rows of all slots one behind another, slot by slot, no padding between windows.

Every attention node takes at least one row. A slot that takes no part but stands before one that does gets one idle row;
slots behind the last active one get zero rows that the graph itself appends and drops (``pad_rows``). Idle rows are written
at the first row that is not committed in any cache of the slot, so nothing ever sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmtd_runtime import contract
from dmtd_runtime.backends.base import Array, SlotStep
from dmtd_runtime.contract import Group

PREFILL_ROUNDING = (16, 32, 64, 128, 256)  # prefill windows are padded up to one of these: few shapes, few bindings


class PackedLayout:
    """Fills packed graphs made for ``slots`` attention nodes a layer."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    def sizes(self, graph: contract.GraphName, steps: Sequence[SlotStep]) -> Mapping[str, int]:
        prefill = steps[0].step.kind == "prefill"
        window = self._packed_rows([len(s.step.window) for s in steps], steps, prefill)
        late = self._packed_rows([len(s.step.late) for s in steps], steps, prefill)
        logits = sum(s.step.wants_logits for s in steps)
        if graph == contract.THINKING:
            return {"window_len": window, "late_len": late}
        if graph == contract.LATE_DECODE:
            return {"late_len": late, "num_logits": logits}
        return {"window_len": window, "late_len": late, "num_logits": logits}

    def fill(
        self, graph: contract.GraphName, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]
    ) -> None:
        late_only = graph == contract.LATE_DECODE
        packed_ids = arrays[contract.INPUT_IDS][0]
        for (start, slot_step), length in zip(
            self._starts(steps, late=late_only), self._lengths(steps, late=late_only), strict=True
        ):
            packed_ids[start : start + length] = slot_step.late_ids if late_only else slot_step.ids
        if not late_only:
            self._fill_group("thinking", arrays, [s.step.window for s in steps], steps, fed, len(packed_ids))
            self._fill_late_rows(arrays[contract.LATE_ROWS], steps)
        if graph != contract.THINKING:
            rows = arrays[contract.GATE_HIDDEN].shape[1]
            self._fill_group("late", arrays, [s.step.late for s in steps], steps, fed, rows)
            self._fill_gates(arrays, steps)

    def logit_index(self, steps: Sequence[SlotStep]) -> Any:
        return 0

    def _packed_rows(self, lengths: Sequence[int], steps: Sequence[SlotStep], prefill: bool) -> int:
        rows = sum(lengths) + self._idle_before(steps)
        if prefill:
            rows = next((size for size in PREFILL_ROUNDING if size >= rows), rows)
        return rows

    def _idle_before(self, steps: Sequence[SlotStep]) -> int:
        return steps[-1].slot + 1 - len(steps) if self._slots > 1 else 0

    def _lengths(self, steps: Sequence[SlotStep], *, late: bool) -> list[int]:
        return [len(s.step.late if late else s.step.window) for s in steps]

    def _starts(self, steps: Sequence[SlotStep], *, late: bool) -> list[tuple[int, SlotStep]]:
        """First packed row of each step; idle slots before it take one row each."""
        starts, row, slot = [], 0, 0
        for slot_step, length in zip(steps, self._lengths(steps, late=late), strict=True):
            if self._slots > 1:
                row += slot_step.slot - slot
            starts.append((row, slot_step))
            row += length
            slot = slot_step.slot + 1
        return starts

    def _fill_group(
        self,
        group: Group,
        arrays: Mapping[str, Array],
        rows: Sequence[range],
        steps: Sequence[SlotStep],
        fed: Sequence[int],
        packed: int,
    ) -> None:
        """Lengths of every slot; rows that round a prefill up belong to the last active slot."""
        seqlens, totals = arrays[contract.seqlens_k(group)], arrays[contract.total_sequence_length(group)]
        used = sum(map(len, rows)) + self._idle_before(steps)
        if self._slots == 1:
            seqlens[0], totals[0] = rows[0].stop + packed - used - 1, rows[0].stop + packed - used
            return
        counts = arrays[contract.slot_rows(group)]
        counts[:] = 1
        for slot in range(self._slots):
            seqlens[slot], totals[slot] = fed[slot], fed[slot] + 1
        for slot_step, row_range in zip(steps, rows, strict=True):
            slot, extra = slot_step.slot, packed - used if slot_step is steps[-1] else 0
            counts[slot] = len(row_range) + extra
            seqlens[slot], totals[slot] = row_range.stop + extra - 1, row_range.stop + extra
        arrays[contract.pad_rows(group)][0] = self._slots - steps[-1].slot - 1

    def _fill_late_rows(self, late_rows: Array, steps: Sequence[SlotStep]) -> None:
        """Which packed window rows enter D; idle and rounding rows point at row 0."""
        late_rows[:] = 0
        window, late = self._starts(steps, late=False), self._starts(steps, late=True)
        for (window_start, slot_step), (late_start, _) in zip(window, late, strict=True):
            count = len(slot_step.step.late)
            first = window_start + len(slot_step.step.window) - count
            late_rows[late_start : late_start + count] = range(first, first + count)

    def _fill_gates(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep]) -> None:
        hidden, thought = arrays[contract.GATE_HIDDEN][0], arrays[contract.GATE_THOUGHT][0]
        hidden[:], thought[:] = True, False
        wanted = []
        for start, slot_step in self._starts(steps, late=True):
            stop = start + len(slot_step.step.late)
            hidden[start:stop], thought[start:stop] = slot_step.step.gate_hidden, slot_step.step.gate_thought
            if slot_step.step.wants_logits:
                wanted.append(stop - 1)
        arrays[contract.LOGIT_ROWS][:] = wanted
