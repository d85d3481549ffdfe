"""Rows for the onnxruntime dialect: T's windows packed slot by slot, late rows as [batch, 1] or [1, rows].

Every attention node takes at least one row. The nodes of slots that take no part are given the last packed row, which is
there for them (token 0) and belongs to nobody; it is written at the first row that is not committed in any cache of the
slot, so nothing ever sees it. Where windows must be equally long a slot's last row is repeated behind it, which is written
where the slot's next window begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmtd_runtime.backends.base import Array, Rows, SlotStep, rounded_rows
from dmtd_runtime.bundle import contract


class PackedLayout:
    """Fills graphs made for ``slots`` attention nodes in every packed layer.

    ``constant_total``: what every total length says in steps behind a prompt, so that a captured graph may be replayed: the
    host reads them when kernels are launched, and on a GPU they bound its work alone. Attention nodes then take equally many
    rows, idle ones too. None: the true lengths, and one row for an idle slot.
    """

    def __init__(self, slots: int, *, constant_total: int | None = None) -> None:
        self._slots, self._constant_total = slots, constant_total

    def split(self, steps: Sequence[SlotStep]) -> Sequence[Sequence[SlotStep]]:
        """Prompts one by one: D takes several rows of one sequence only, and a chunk is bound by arithmetic anyway."""
        return [[step] for step in steps] if steps[0].step.kind == "prefill" else [steps]

    def batch_slots(self, steps: Sequence[SlotStep]) -> range:
        """The slots whose caches D's layers see, as one batch."""
        if steps[0].step.kind == "prefill":
            return range(steps[0].slot, steps[0].slot + 1)
        return range(steps[-1].slot + 1)

    def sizes(self, graph: contract.GraphName, steps: Sequence[SlotStep], rows: Rows = "last") -> Mapping[str, int]:
        sizes = {"batch": len(self.batch_slots(steps)), "late_len": 1}
        if steps[0].step.kind == "prefill":
            sizes["late_len"] = rounded_rows(len(steps[0].step.late))
        if graph != contract.LATE_DECODE:
            window = sum(len(s.step.window) for s in steps)
            if steps[0].step.kind == "prefill":
                window += sizes["late_len"] - len(steps[0].step.late)
            lengths = self._slot_lengths(steps, window)
            if self._slots > 1:
                sizes |= {contract.slot_len(slot): length for slot, length in enumerate(lengths)}
            sizes["window_len"] = window + (len(steps) < self._slots)
        if graph != contract.THINKING:
            wanted = sum(s.step.wants_logits for s in steps)
            # Never none: an empty tensor is a risk on a GPU, and the row of a chunk that wants no logits is simply not read.
            sizes["num_logits"] = max(1, wanted * (sizes["late_len"] if rows == "all" else 1))
        return sizes

    def fill(
        self, graph: contract.GraphName, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]
    ) -> None:
        if graph != contract.LATE_DECODE:
            self._fill_window(arrays, steps, fed)
        if graph != contract.THINKING:
            self._fill_late(arrays, steps, fed)
            self._fill_logit_rows(arrays, steps)
            if graph == contract.LATE_DECODE:
                ids, first = arrays[contract.INPUT_IDS], self.batch_slots(steps).start
                for s in steps:
                    ids[s.slot - first, : len(s.step.late)] = s.late_ids

    def logit_index(self, steps: Sequence[SlotStep], rows: Rows = "last") -> Any:
        wanting = [s for s in steps if s.step.wants_logits]
        if rows == "last":
            return 0, slice(0, len(wanting))
        # Several late rows are of one sequence.
        return 0, slice(0, sum(len(s.step.late) for s in wanting))

    def _slot_lengths(self, steps: Sequence[SlotStep], window: int) -> list[int]:
        """Rows of each slot's attention node; ``window``: packed rows without the idle one."""
        if self._slots == 1:
            return [window]
        lengths, prefill = [1] * self._slots, steps[0].step.kind == "prefill"
        for s in steps:
            lengths[s.slot] = window if prefill else len(s.step.window)
        even = self._constant_total is not None and not prefill
        return [max(lengths)] * self._slots if even else lengths

    def _fill_window(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]) -> None:
        packed_ids, late_rows = arrays[contract.INPUT_IDS][0], arrays[contract.LATE_ROWS]
        idle = len(steps) < self._slots
        window = len(packed_ids) - idle
        lengths = self._slot_lengths(steps, window)
        starts = [fed[slot] for slot in range(self._slots)]
        owned: dict[int, range] = {}
        row, first = 0, self.batch_slots(steps).start
        for s in steps:
            packed_ids[row : row + len(s.ids)] = s.ids
            # Rows that round a prompt up belong to it.
            owned[s.slot] = range(row, window if s is steps[-1] else row + len(s.ids))
            row += len(s.step.window)
            late = len(s.step.late)
            late_rows[s.slot - first, :late] = range(row - late, row)
            starts[0 if self._slots == 1 else s.slot] = s.step.window.start
        self._fill_lengths(arrays, steps, starts, lengths)
        if self._slots > 1:
            if idle:
                packed_ids[window] = 0
            self._fill_rows(arrays, owned, lengths, window if idle else None)

    def _fill_lengths(
        self, arrays: Mapping[str, Array], steps: Sequence[SlotStep], starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        seqlens, prefill = arrays[contract.seqlens_k("thinking")], steps[0].step.kind == "prefill"
        for slot, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            seqlens[slot] = start + length - 1
            name = contract.total_sequence_length("thinking", slot if self._slots > 1 else None)
            arrays[name][0] = self._total(start + length, prefill)

    def _fill_rows(
        self, arrays: Mapping[str, Array], owned: Mapping[int, range], lengths: Sequence[int], idle_row: int | None
    ) -> None:
        """Which packed rows each attention node takes, and where they stand behind it."""
        kept, at = arrays[contract.KEPT_ROWS], 0
        for slot, length in enumerate(lengths):
            own = owned.get(slot)
            if own is None:
                assert idle_row is not None, "a slot without a window has the idle row"
                arrays[contract.slot_rows(slot)][:] = idle_row
                kept[idle_row] = at
            else:
                arrays[contract.slot_rows(slot)][:] = np.minimum(np.arange(own.start, own.start + length), own.stop - 1)
                kept[own.start : own.stop] = np.arange(at, at + len(own))
            at += length

    def _fill_late(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]) -> None:
        hidden, thought = arrays[contract.GATE_HIDDEN], arrays[contract.GATE_THOUGHT]
        seqlens = arrays[contract.seqlens_k("late")]
        slots, rows = self.batch_slots(steps), hidden.shape[1]
        hidden[:], thought[:] = True, False
        for batch_row, slot in enumerate(slots):
            seqlens[batch_row] = fed[slot] + rows - 1
        total = int(seqlens.max()) + 1
        arrays[contract.total_sequence_length("late")][0] = self._total(total, steps[0].step.kind == "prefill")
        for s in steps:
            batch_row, count = s.slot - slots.start, len(s.step.late)
            hidden[batch_row, :count], thought[batch_row, :count] = s.step.gate_hidden, s.step.gate_thought

    def _fill_logit_rows(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep]) -> None:
        """The last row of each sequence that wants logits, or as many of its rows as there is room for."""
        logit_rows, width = arrays[contract.LOGIT_ROWS], arrays[contract.GATE_HIDDEN].shape[1]
        first, wanting = self.batch_slots(steps).start, [s for s in steps if s.step.wants_logits]
        if len(logit_rows) > max(1, len(wanting)):
            logit_rows[:] = np.minimum(np.arange(len(logit_rows)), len(wanting[0].step.late) - 1)
            return
        last = [(s.slot - first) * width + len(s.step.late) - 1 for s in wanting]
        logit_rows[:] = last or [0]

    def _total(self, true: int, prefill: bool) -> int:
        return true if prefill or self._constant_total is None else self._constant_total
