"""Whole cycles in the cycle graph, of sequences that take the likeliest tokens: a run for as many steps as the graph has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from dmtd_runtime.backends.base import Array, RunOutput, RunStats, SlotCycle, SlotStep
from dmtd_runtime.backends.layouts.layout import Layout
from dmtd_runtime.backends.onnxruntime.binding import Binding
from dmtd_runtime.backends.onnxruntime.memory import OrtMemory
from dmtd_runtime.backends.onnxruntime.prepared import keep
from dmtd_runtime.bundle import contract
from dmtd_runtime.sampling.sampler import best_token

Bind = Callable[[contract.GraphName, Mapping[str, int], range, bool, int, int], Binding]
"""As the prepared runs' own, and the steps of D."""
OnLogits = Callable[[int, int, Array], None]
"""(slot, position that was fed, logits [vocab]) of a step in a run of several."""


class HostCycles:
    """Runs the cycles of some slots; ``most_steps`` of a graph in one run, ``slots`` of the caches.

    ``joins``: T and D are one run; else one for T, and one for D and the steps behind.
    """

    def __init__(
        self, layout: Layout, bind: Bind, memory: OrtMemory, *, most_steps: int, slots: int, joins: bool
    ) -> None:
        self._layout, self._bind, self._memory, self._slots, self._joins = layout, bind, memory, slots, joins
        self._logits = [contract.logits(step) for step in range(most_steps)]
        self._bindings: dict[Hashable, Binding] = {}
        self.on_logits: OnLogits | None = None

    def run(self, cycles: Sequence[SlotCycle], committed: Sequence[int], stats: RunStats) -> RunOutput:
        """The tokens of all steps, int64 [steps, slots], NOT_FINITE where logits are not; every step feeds those before it.

        Fewer steps where all sequences end before the cycle does, and what is left of it is not in the same run.
        """
        tokens, ids = list[list[int]](), [cycle.ids for cycle in cycles]
        fed, kinds = [*committed, *(0,) * (self._slots - len(committed))], [step.kind for step in cycles[0].steps]
        while (done := len(tokens)) < len(kinds) and not (done and _all_end(cycles, tokens)):
            steps = [SlotStep(slot=c.slot, step=c.steps[done], ids=own) for c, own in zip(cycles, ids, strict=True)]
            behind = kinds[done + 1 : done + len(self._logits)]
            count = 1 + len(list(itertools.takewhile(lambda kind: kind == "late", behind)))
            tokens += self._run_steps(steps, fed, count, stats)
            ids = [[max(token, 0)] for token in tokens[-1]]
            for cycle in cycles:
                fed[cycle.slot] = cycle.steps[len(tokens) - 1].late.stop
        return RunOutput(tokens=np.array(tokens, np.int64))

    def _run_steps(self, steps: Sequence[SlotStep], fed: Sequence[int], count: int, stats: RunStats) -> list[list[int]]:
        """Run a step and late ones behind it, ``count`` in all, in one go: the tokens chosen in each, one a slot."""
        late = steps[0].step.kind == "late"
        stats.full_passes += not late
        stats.late_steps += count - (not late)
        stats.refill_rows += sum(max(0, len(s.step.window) - 1) for s in steps)
        if not (late or self._joins):
            binding = self._binding(contract.THINKING, steps, 1)
            self._fill(contract.THINKING, binding, steps, fed)
            binding.run(stats)
        name = contract.LATE_DECODE if late or not self._joins else contract.FULL_PASS
        binding = self._binding(name, steps, count)
        self._fill(name, binding, steps, fed)
        logit_rows = binding.arrays[contract.LOGIT_ROWS]
        logit_rows[:] = range(len(logit_rows))  # all: what a step chooses the next one feeds
        binding.run(stats)
        found = [self._memory.read(binding.buffers[logits])[0] for logits in self._logits[:count]]
        if self.on_logits is not None:
            for (k, logits), s in itertools.product(enumerate(found), steps):
                self.on_logits(s.slot, s.step.late.stop - 1 + k, logits[s.slot].copy())
        return [[best_token(logits[s.slot]) for s in steps] for logits in found]

    def _fill(self, name: contract.GraphName, binding: Binding, steps: Sequence[SlotStep], fed: Sequence[int]) -> None:
        binding.begin()
        self._layout.fill(name, binding.arrays, steps, fed)

    def _binding(self, name: contract.GraphName, steps: Sequence[SlotStep], count: int) -> Binding:
        key = (name, count, *[(s.slot, len(s.step.window)) for s in steps])
        if (binding := self._bindings.get(key)) is None:
            slots, sizes = self._layout.batch_slots(name, steps), self._layout.sizes(name, steps)
            if name != contract.THINKING:
                sizes = {**sizes, "num_logits": len(slots)}
            keep(self._bindings, key, binding := self._bind(name, sizes, slots, False, 0, count))
        return binding


def _all_end(cycles: Sequence[SlotCycle], tokens: Sequence[Sequence[int]]) -> bool:
    return all(any(map(cycle.sampler.ends, own)) for cycle, own in zip(cycles, zip(*tokens, strict=True), strict=True))
