"""From waiting sequences to finished ones: schedule -> run -> commit -> choose, one step at a time.

Where the backend runs cycles, and every sequence stands at a head, whole cycles are enqueued, the next one before the tokens
of this one are looked at. Ends are then found when a cycle is over: what it chose behind the end is dropped unseen.

What comes next is the scheduler's, numbers are the backend's; here sequences are told of their tokens. No threads:
``worker.py`` has them.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from dmtd_runtime.backends.base import Backend, SlotCycle, SlotStep
from dmtd_runtime.cycle import CyclePlan, Step
from dmtd_runtime.serving.scheduler import Planned, Scheduler
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent


class Loop:
    """Runs sequences on one backend. Not thread-safe."""

    def __init__(
        self,
        backend: Backend,
        plan: CyclePlan,
        *,
        max_rows: int | None = None,
        closing: Callable[[], bool] = lambda: False,
    ) -> None:
        """``max_rows``: of a pass over prompts; the backend's own limit where that is lower.

        ``closing``: whether who still waits is no longer to begin, and ends with ``abort``.
        """
        self._closing = closing
        rows = backend.max_rows if max_rows is None else min(max_rows, backend.max_rows)
        self._backend, self._cycle_length = backend, plan.cycle.cycle_length
        self._scheduler = Scheduler(plan, num_slots=backend.slots, max_rows=rows)
        self._sequences: dict[int, SequenceRun] = {}
        self._numbers = itertools.count()

    @property
    def sequences(self) -> list[SequenceRun]:
        """Those that have not left yet, waiting or running."""
        return list(self._sequences.values())

    def add(self, sequence: SequenceRun) -> None:
        """Let a sequence wait for its turn."""
        number = next(self._numbers)
        self._sequences[number] = sequence
        self._scheduler.admit(number, len(sequence.ids))

    def step(self) -> None:
        """Let go of who was cancelled, then run what comes next and tell of its tokens. Errors of the backend pass through."""
        self._leave(number for number, sequence in self._sequences.items() if sequence.end_from_outside())
        if self._closing():
            self._end_waiting()
        if not self._sequences or self._run_cycles():
            return
        planned = self._scheduler.schedule()
        for one in planned:
            sequence = self._sequences[one.sequence]
            if sequence.started is None:
                sequence.started = time.monotonic()
        steps = [self._slot_step(one) for one in planned]
        wanting = [one for one in planned if one.step.wants_logits]
        choose = self._backend.chooses_tokens and not any(
            self._sequences[one.sequence].sampler.needs_logits for one in planned
        )
        output = self._backend.run(steps, self._scheduler.committed, choose=choose)
        self._scheduler.commit(planned)
        for row, one in enumerate(wanting):
            if output.tokens is not None:
                self._sequences[one.sequence].take(int(output.tokens[row]))
            else:
                assert output.logits is not None, "a run gives tokens or logits"
                self._sequences[one.sequence].choose(output.logits[row])
        self._leave(one.sequence for one in wanting if self._sequences[one.sequence].ended)

    def _run_cycles(self) -> bool:
        """Run whole cycles until a sequence ends, if all may run them; whether any ran.

        The cycle after the one under way is enqueued before that one's tokens are known, unless a sequence is certain to end.
        """
        running = [self._sequences[number] for number in self._scheduler.running]
        if not running or not self._backend.runs_cycles or any(s.sampler.wants_logprobs for s in running):
            return False
        planned = self._start_cycle(0)
        if not planned:
            return False
        tau, under_way = self._cycle_length, deque([planned])
        while under_way:
            if not any(s.ended for s in running) and len(under_way) == 1 and _go_on(running, tau):
                under_way.append(self._start_cycle(tau))
            tokens, cycle = self._backend.finish_cycle(), under_way.popleft()
            for step, index in itertools.product(range(tau), range(len(cycle))):
                sequence = self._sequences[cycle[index].sequence]
                if not sequence.ended:
                    sequence.take(int(tokens[step, index]))
            self._end_from_outside()
        self._leave(number for number, sequence in self._sequences.items() if sequence.ended)
        return True

    def _start_cycle(self, unseen: int) -> list[Planned]:
        """Enqueue the next cycle of all sequences and take its steps as run; nothing where they do not all stand at a head.

        ``unseen``: tokens of a cycle under way, which this one follows.
        """
        planned = self._scheduler.schedule_cycle()
        cycles = []
        for one in planned:
            sequence, window = self._sequences[one.sequence], one.steps[0].window
            ids = () if unseen else sequence.ids[window.start : window.stop]
            cycles.append(SlotCycle(slot=one.slot, steps=one.steps, ids=ids, sampler=sequence.sampler, unseen=unseen))
        if planned:
            self._backend.start_cycle(cycles, follows=unseen > 0)
            self._scheduler.commit(planned)
        return planned

    def _end_waiting(self) -> None:
        waiting = self._sequences.keys() - set(self._scheduler.running)
        for number in waiting:
            self._sequences[number].tell(TokenEvent(choice=None, finish_reason="abort"))
        self._leave(waiting)

    def _end_from_outside(self) -> None:
        """End who was cancelled while a cycle ran. Those with a slot keep it until no cycle is under way."""
        running = set(self._scheduler.running)
        ended = [n for n, s in self._sequences.items() if not s.ended and s.end_from_outside()]
        self._leave(number for number in ended if number not in running)

    def _leave(self, numbers: Iterable[int]) -> None:
        """Let sequences go, from the last slot down: what moves into a gap is then alive."""
        leaving = set(numbers)
        order = [number for number in reversed(self._scheduler.running) if number in leaving]
        for number in (*order, *leaving.difference(order)):
            sequence, committed = self._sequences.pop(number), self._scheduler.committed
            slot = self._scheduler.slot_of(number)
            if sequence.failed and slot is not None:  # it may have left NaN in the caches
                self._backend.clear(slot, committed[slot])
            move = self._scheduler.free(number)
            if move is not None:
                self._backend.move(move.source, move.target, move.rows)

    def _slot_step(self, one: Planned) -> SlotStep:
        ids = self._sequences[one.sequence].ids
        return SlotStep(slot=one.slot, step=one.step, ids=ids[_first(one.step) : one.step.late.stop])


def run_batch(
    backend: Backend, plan: CyclePlan, sequences: Sequence[SequenceRun], *, max_rows: int | None = None
) -> None:
    """Run ``sequences`` to their ends. Errors of the backend itself pass through."""
    loop = Loop(backend, plan, max_rows=max_rows)
    for sequence in sequences:
        loop.add(sequence)
    while loop.sequences:
        loop.step()


def _first(step: Step) -> int:
    return step.window.start if step.window else step.late.start


def _go_on(running: Sequence[SequenceRun], tokens: int) -> bool:
    """Whether no sequence is certain to end within so many tokens."""
    left = [sequence.stops.remaining for sequence in running]
    return all(remaining is None or remaining > tokens for remaining in left)
