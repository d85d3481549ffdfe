"""Rows for the onnxruntime dialect: T's windows packed slot by slot, late rows as [batch, 1] or [1, rows].

Every attention node takes at least one row. The nodes of slots that take no part are given the last packed row, which is
there for them (token 0) and belongs to nobody; it is written at the first row that is not committed in any cache of the
slot, so nothing ever sees it. Where windows must be equally long a slot's last row is repeated behind it, which is written
where the slot's next window begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmtd_runtime.backends.base import PREFILL_ROUNDING, Array, Rows, SlotStep, rounded_rows
from dmtd_runtime.bundle import contract


class PackedLayout:
    """Fills graphs made for ``slots`` attention nodes in every packed layer.

    ``constant_total``: what every total length says in steps behind a prompt, so that a captured graph may be replayed: the
    host reads them when kernels are launched, and on a GPU they bound its work alone. Attention nodes then take equally many
    rows, idle ones too. None: the true lengths, and one row for an idle slot. ``few_shapes``: chunks of prompts are padded to
    one of few sizes, which a GPU's libraries prepare for one by one; else by less than ``PREFILL_ROUNDING[0]`` rows.
    """

    def __init__(self, slots: int, *, constant_total: int | None = None, few_shapes: bool = False) -> None:
        self._slots, self._constant_total, self._few_shapes = slots, constant_total, few_shapes

    def split(self, steps: Sequence[SlotStep]) -> Sequence[Sequence[SlotStep]]:
        """Heads together, prompts one by one: D takes several rows of one sequence only."""
        prompts = [[step] for step in steps if step.step.kind == "prefill"]
        others = [step for step in steps if step.step.kind != "prefill"]
        return [others, *prompts] if others else prompts

    def batch_slots(self, graph: contract.GraphName, steps: Sequence[SlotStep]) -> range:
        """The slots whose caches D's layers see, as one batch; T's see those of all slots, one by one."""
        return range(1) if graph == contract.THINKING else self._late_slots(steps)

    def late_offsets(self, parts: Sequence[Sequence[SlotStep]]) -> Sequence[int]:
        """Where the late rows of each part begin among those of a pass of T over all of them."""
        counts = [len(self._late_slots(part)) * self._late_len(part) for part in parts]
        return [0, *itertools.accumulate(counts)][:-1]

    def sizes(self, graph: contract.GraphName, steps: Sequence[SlotStep], rows: Rows = "last") -> Mapping[str, int]:
        parts = self.split(steps)
        sizes = {"batch": len(self._late_slots(steps)), "late_len": self._late_len(parts[0])}
        if graph == contract.THINKING:  # whatever parts its late rows go to, they are one list
            sizes = {"batch": 1, "late_len": sum(len(self._late_slots(p)) * self._late_len(p) for p in parts)}
        if graph != contract.LATE_DECODE:
            lengths = self._slot_lengths(steps)
            if self._slots > 1:
                sizes |= {contract.slot_len(slot): length for slot, length in enumerate(lengths)}
            sizes["window_len"] = sum(map(self._own_rows, steps)) + (len(steps) < self._slots)
        if graph != contract.THINKING:
            assert len(parts) == 1, "D's rows are those of one part"
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
                self._fill_late_ids(arrays[contract.INPUT_IDS], steps)

    def logit_index(self, steps: Sequence[SlotStep], rows: Rows = "last") -> Any:
        wanting = [s for s in steps if s.step.wants_logits]
        if rows == "last":
            return 0, slice(0, len(wanting))
        # Several late rows are of one sequence.
        return 0, slice(0, sum(len(s.step.late) for s in wanting))

    def _late_slots(self, steps: Sequence[SlotStep]) -> range:
        if steps[0].step.kind == "prefill":
            return range(steps[0].slot, steps[0].slot + 1)
        return range(steps[-1].slot + 1)

    def _own_rows(self, step: SlotStep) -> int:
        """Packed rows of a step's window: a prompt's chunk is rounded up, so that there are not too many shapes."""
        rows = len(step.step.window)
        if step.step.kind != "prefill":
            return rows
        return rounded_rows(rows) if self._few_shapes else -(-rows // PREFILL_ROUNDING[0]) * PREFILL_ROUNDING[0]

    def _late_len(self, part: Sequence[SlotStep]) -> int:
        return self._own_rows(part[0]) if part[0].step.kind == "prefill" else 1

    def _slot_lengths(self, steps: Sequence[SlotStep]) -> list[int]:
        """Rows of each slot's attention node."""
        if self._slots == 1:
            return [self._own_rows(steps[0])]
        lengths = [1] * self._slots
        for s in steps:
            lengths[s.slot] = self._own_rows(s)
        even = self._constant_total is not None and steps[0].step.kind != "prefill"
        return [max(lengths)] * self._slots if even else lengths

    def _fill_window(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]) -> None:
        if self._slots == 1 and steps[0].step.kind != "prefill":  # the usual step: as below, in fewer words
            [s] = steps
            arrays[contract.INPUT_IDS][0] = s.ids
            arrays[contract.LATE_ROWS][0, 0] = len(s.ids) - 1
            self._fill_lengths(arrays, steps, [s.step.window.start], [len(s.ids)])
            return
        packed_ids, late_rows = arrays[contract.INPUT_IDS][0], arrays[contract.LATE_ROWS].reshape(-1)
        idle = len(steps) < self._slots
        lengths = self._slot_lengths(steps)
        starts = [fed[slot] for slot in range(self._slots)]
        owned: dict[int, range] = {}
        row, parts = 0, self.split(steps)
        for part, late_at in zip(parts, self.late_offsets(parts), strict=True):
            first, width = self._late_slots(part).start, self._late_len(part)
            for s in part:
                packed_ids[row : row + len(s.ids)] = s.ids
                owned[s.slot] = range(row, row + self._own_rows(s))
                late_at_slot, late = late_at + (s.slot - first) * width, len(s.step.late)
                end = row + len(s.step.window)
                late_rows[late_at_slot : late_at_slot + late] = range(end - late, end)
                starts[0 if self._slots == 1 else s.slot] = s.step.window.start
                row = owned[s.slot].stop
        self._fill_lengths(arrays, steps, starts, lengths)
        if self._slots > 1:
            if idle:
                packed_ids[row] = 0
            self._fill_rows(arrays, owned, lengths, row if idle else None)

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

    def _fill_late_ids(self, ids: Array, steps: Sequence[SlotStep]) -> None:
        if steps[0].step.kind == "prefill":
            ids[0, : len(steps[0].late_ids)] = steps[0].late_ids
        else:
            for s in steps:
                ids[s.slot, 0] = s.ids[-1]

    def _fill_late(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]) -> None:
        hidden, thought = arrays[contract.GATE_HIDDEN], arrays[contract.GATE_THOUGHT]
        slots, rows, prefill = self._late_slots(steps), hidden.shape[1], steps[0].step.kind == "prefill"
        last = [fed[slot] + rows - 1 for slot in slots]
        arrays[contract.seqlens_k("late")][:] = last
        arrays[contract.total_sequence_length("late")][0] = self._total(max(last) + 1, prefill)
        if prefill or len(steps) < len(slots):
            hidden[:], thought[:] = True, False
        if prefill:
            [only] = steps
            count = len(only.step.late)
            hidden[0, :count], thought[0, :count] = only.step.gate_hidden, only.step.gate_thought
        else:  # a row each, written one by one, which costs numpy least
            for s in steps:
                [hidden[s.slot, 0]], [thought[s.slot, 0]] = s.step.gate_hidden, s.step.gate_thought

    def _fill_logit_rows(self, arrays: Mapping[str, Array], steps: Sequence[SlotStep]) -> None:
        """The last row of each sequence that wants logits, or as many of its rows as there is room for."""
        logit_rows, width = arrays[contract.LOGIT_ROWS], arrays[contract.GATE_HIDDEN].shape[1]
        first, wanting = self._late_slots(steps).start, [s for s in steps if s.step.wants_logits]
        if len(logit_rows) > max(1, len(wanting)):
            logit_rows[:] = np.minimum(np.arange(len(logit_rows)), len(wanting[0].step.late) - 1)
            return
        last = [(s.slot - first) * width + len(s.step.late) - 1 for s in wanting]
        logit_rows[:] = last or [0]

    def _total(self, true: int, prefill: bool) -> int:
        return true if prefill or self._constant_total is None else self._constant_total
