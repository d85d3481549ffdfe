"""Whole cycles in the cycle graph, of sequences that take the likeliest tokens: a run for as many steps as the graph has."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from dmtd_runtime.backends.base import Array, RunOutput, RunStats, SlotCycle, SlotStep
from dmtd_runtime.backends.layouts.layout import Layout
from dmtd_runtime.backends.onnxruntime.binding import Binding
from dmtd_runtime.backends.onnxruntime.prepared import keep
from dmtd_runtime.bundle import contract
from dmtd_runtime.cycle import StepKind
from dmtd_runtime.sampling.sampler import best_token

Bind = Callable[[contract.GraphName, Mapping[str, int], range, bool, int, int], Binding]
"""As the prepared runs' own, and the steps of D."""
OnLogits = Callable[[int, int, Array], None]
"""(slot, position that was fed, logits [vocab]) of a step in a run of several."""


class HostCycles:
    """Runs the cycles of some slots; ``most_steps`` of a graph in one run, ``slots`` of the caches.

    ``joins``: T and D are one run; else one for T, and one for D and the steps behind.
    """

    def __init__(self, layout: Layout, bind: Bind, *, most_steps: int, slots: int, joins: bool) -> None:
        self._layout, self._bind, self._slots, self._joins = layout, bind, slots, joins
        self._logits = [contract.logits(step) for step in range(most_steps)]
        self._bindings: dict[Hashable, tuple[Binding, Sequence[Sequence[Array]]]] = {}
        self.on_logits: OnLogits | None = None

    def run(self, cycles: Sequence[SlotCycle], committed: Sequence[int], stats: RunStats) -> RunOutput:
        """The tokens of all steps, int64 [steps, slots], NOT_FINITE where logits are not; every step feeds those before it.

        Fewer steps where all sequences end before the cycle does, and what is left of it is not in the same run.
        """
        tokens, ids, going = list[list[int]](), [cycle.ids for cycle in cycles], list(range(len(cycles)))
        fed = [*committed, *(0,) * (self._slots - len(committed))]
        for first, count in _runs(tuple([step.kind for step in cycles[0].steps]), len(self._logits)):
            if not going:
                break
            steps = [SlotStep(slot=c.slot, step=c.steps[first], ids=own) for c, own in zip(cycles, ids, strict=True)]
            chosen = self._run_steps(steps, fed, count, stats)
            tokens += chosen
            going = [place for place in going if not any(cycles[place].sampler.ends(row[place]) for row in chosen)]
            ids = [[max(token, 0)] for token in chosen[-1]]
            for cycle in cycles:
                fed[cycle.slot] = cycle.steps[first + count - 1].late.stop
        return RunOutput(tokens=np.array(tokens, np.int64))

    def _run_steps(self, steps: Sequence[SlotStep], fed: Sequence[int], count: int, stats: RunStats) -> list[list[int]]:
        """Run a step and late ones behind it, ``count`` in all, in one go: the tokens chosen in each, one a slot."""
        late = steps[0].step.kind == "late"
        stats.full_passes += not late
        stats.late_steps += count - (not late)
        stats.refill_rows += sum(max(0, len(s.step.window) - 1) for s in steps)
        if not (late or self._joins):
            binding, _ = self._binding(contract.THINKING, steps, 1)
            self._fill(contract.THINKING, binding, steps, fed)
            binding.run(stats)
        name = contract.LATE_DECODE if late or not self._joins else contract.FULL_PASS
        binding, found = self._binding(name, steps, count)
        self._fill(name, binding, steps, fed)
        logit_rows = binding.arrays[contract.LOGIT_ROWS]
        if len(logit_rows) > len(steps):  # idle slots, too: what a step chooses the next one feeds
            logit_rows[:] = range(len(logit_rows))
        binding.run(stats)
        if self.on_logits is not None:
            for (k, rows), (place, s) in itertools.product(enumerate(found), enumerate(steps)):
                self.on_logits(s.slot, s.step.late.stop - 1 + k, rows[place].copy())
        return [[best_token(logits) for logits in rows] for rows in found]

    def _fill(self, name: contract.GraphName, binding: Binding, steps: Sequence[SlotStep], fed: Sequence[int]) -> None:
        binding.begin()
        self._layout.fill(name, binding.arrays, steps, fed)

    def _binding(
        self, name: contract.GraphName, steps: Sequence[SlotStep], count: int
    ) -> tuple[Binding, Sequence[Sequence[Array]]]:
        """And where it leaves logits [vocab]: of each of ``count`` steps of D, of each sequence."""
        key = (name, count, *[(s.slot, len(s.step.window)) for s in steps])
        if (held := self._bindings.get(key)) is None:
            slots, sizes, logits = self._layout.batch_slots(name, steps), self._layout.sizes(name, steps), []
            if name != contract.THINKING:
                sizes = {**sizes, "num_logits": len(slots)}
                logits = self._logits[:count]
            binding = self._bind(name, sizes, slots, False, 0, count)
            found = [array[0] for output in logits if (array := binding.buffers[output].array) is not None]
            assert len(found) == len(logits), "a host's buffers have arrays"
            keep(self._bindings, key, held := (binding, [[rows[s.slot] for s in steps] for rows in found]))
        return held


@functools.cache
def _runs(kinds: tuple[StepKind, ...], most: int) -> Sequence[tuple[int, int]]:
    """The first step of each run, and how many: late steps run with what is before them, at most ``most`` in all."""
    runs, first = list[tuple[int, int]](), 0
    while first < len(kinds):
        behind = kinds[first + 1 : first + most]
        runs.append((first, 1 + len(list(itertools.takewhile(lambda kind: kind == "late", behind)))))
        first = sum(runs[-1])
    return runs
