"""One static batch, from prompts to finished sequences: plan -> run -> commit -> choose, until all are done.

Where the backend runs cycles, and every sequence stands at a head, whole cycles are enqueued, the next one before the tokens
of this one are looked at. Ends are then found when a cycle is over: what it chose behind the end is dropped unseen.

No threads and no requests here: ``worker.py`` forms batches of :class:`SequenceRun` and is told of every token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dmtd_runtime.backends.base import Array, Backend, SlotCycle, SlotStep
from dmtd_runtime.cycle import CyclePlan, Position, Step
from dmtd_runtime.errors import DmtdError
from dmtd_runtime.sampling.sampler import Choice, Sampler
from dmtd_runtime.sampling.stops import StopRules

FinishReason = Literal["stop", "length", "abort", "deadline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """What happened to a sequence: a token and the text it released, and the end of it if ``finish_reason`` is set.

    ``choice`` is None where the sequence was ended from outside; ``error`` is set where it failed.
    """

    choice: Choice | None
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: DmtdError | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceRun:
    """One sequence on its way through the loop, equal to itself alone. ``ids`` grows by every chosen token."""

    ids: list[int]
    sampler: Sampler
    stops: StopRules
    on_event: Callable[[TokenEvent], None]
    cancelled: Callable[[], FinishReason | None] = lambda: None
    deadline: float | None = None  # of time.monotonic()
    started: float | None = None  # when its batch began
    ended: bool = False
    failed: bool = False
    slot: int = -1
    position: Position = field(init=False)

    def __post_init__(self) -> None:
        self.position = Position(prompt_len=len(self.ids))

    def end_from_outside(self) -> bool:
        """End the sequence if it was cancelled or its deadline has passed; whether it did."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        reason = self.cancelled() or ("deadline" if late else None)
        if reason is None:
            return False
        self.tell(TokenEvent(choice=None, text=self.stops.flush(), finish_reason=reason))
        return True

    def tell(self, event: TokenEvent) -> None:
        """Hand an event on, and note the end."""
        self.failed = event.error is not None
        self.ended = self.failed or event.finish_reason is not None
        self.on_event(event)


def run_batch(
    backend: Backend,
    plan: CyclePlan,
    sequences: Sequence[SequenceRun],
    *,
    between_steps: Callable[[], None] = lambda: None,
) -> None:
    """Run ``sequences`` (at most ``backend.slots``) to their ends. Errors of the backend itself pass through."""
    assert len(sequences) <= backend.slots, f"{len(sequences)} sequences for {backend.slots} slots"
    active = list(sequences)
    for slot, sequence in enumerate(active):
        sequence.slot = slot
        backend.reset(slot)
    while True:
        between_steps()
        _end_cancelled(backend, active)
        if not active:
            return
        if backend.runs_cycles and not any(sequence.sampler.wants_logprobs for sequence in active):
            ran, finished = _run_cycles(backend, plan, active, between_steps)
            for sequence in reversed(finished):
                _leave(backend, active, sequence)
            if ran:
                continue
        steps = plan.next_steps([sequence.position for sequence in active], backend.max_rows)
        taking_part = [(active[index], step) for index, step in steps]
        slot_steps = [_slot_step(sequence, step) for sequence, step in taking_part]
        if backend.chooses_tokens and not any(sequence.sampler.needs_logits for sequence, _ in taking_part):
            rows = backend.run(slot_steps, greedy=True)
        else:
            rows = backend.run(slot_steps)
        finished = _take_tokens(taking_part, rows)
        # From the last slot down: what moves into a gap is then alive, and NaN of a failed sequence is never carried along.
        for sequence in reversed(finished):
            _leave(backend, active, sequence)


def _run_cycles(
    backend: Backend, plan: CyclePlan, active: Sequence[SequenceRun], between_cycles: Callable[[], None]
) -> tuple[bool, list[SequenceRun]]:
    """Run whole cycles until a sequence ends; (whether any ran, the sequences that ended).

    The cycle after the one under way is enqueued before that one's tokens are known, unless a sequence is certain to end.
    """
    if not _start_cycle(backend, plan, active, 0):
        return False, []
    under_way, finished = deque([plan.cycle.cycle_length]), [False] * len(active)
    while under_way:
        if not any(finished) and len(under_way) == 1 and _goes_on(active, under_way[0]):
            _start_cycle(backend, plan, active, under_way[0])
            under_way.append(plan.cycle.cycle_length)
        tokens = backend.finish_cycle()
        for step in range(under_way.popleft()):
            for index, sequence in enumerate(active):
                if not sequence.ended:
                    sequence.tell(_choose(sequence, tokens[step, index]))
        between_cycles()
        for sequence in active:
            if not sequence.ended:
                sequence.end_from_outside()
        finished = [sequence.ended for sequence in active]
    return True, [sequence for sequence in active if sequence.ended]


def _start_cycle(backend: Backend, plan: CyclePlan, active: Sequence[SequenceRun], unseen: int) -> bool:
    """Enqueue the next cycle of all sequences and take its steps as done; False where they do not all stand at a head.

    ``unseen``: tokens of a cycle under way, which this one follows.
    """
    cycles = plan.next_cycle([sequence.position for sequence in active])
    if cycles is None:
        return False
    slots = []
    for sequence, steps in zip(active, cycles, strict=True):
        window = steps[0].window
        ids = () if unseen else sequence.ids[window.start : window.stop]
        slots.append(SlotCycle(slot=sequence.slot, steps=steps, ids=ids, sampler=sequence.sampler, unseen=unseen))
    backend.start_cycle(slots, follows=unseen > 0)
    for sequence, steps in zip(active, cycles, strict=True):
        for step in steps:
            sequence.position.commit(step)
    return True


def _goes_on(active: Sequence[SequenceRun], tokens: int) -> bool:
    """Whether no sequence is certain to end within so many tokens."""
    left = [sequence.stops.remaining for sequence in active]
    return all(remaining is None or remaining > tokens for remaining in left)


def _slot_step(sequence: SequenceRun, step: Step) -> SlotStep:
    first = step.window.start if step.window else step.late.start
    return SlotStep(slot=sequence.slot, step=step, ids=sequence.ids[first : step.late.stop])


def _take_tokens(steps: Sequence[tuple[SequenceRun, Step]], rows: Array) -> list[SequenceRun]:
    """Commit every step, choose a token where one is due (from logits, or as the device chose); returns what ended."""
    finished, row = [], 0
    for sequence, step in steps:
        sequence.position.commit(step)
        if not step.wants_logits:
            continue
        event = _choose(sequence, rows[row])
        row += 1
        sequence.tell(event)
        if sequence.ended:
            finished.append(sequence)
    return finished


def _choose(sequence: SequenceRun, row: Array) -> TokenEvent:
    """``row``: logits [vocab], or the device's choice, a scalar that is negative where logits were not finite."""
    try:
        if row.ndim == 1:
            choice = sequence.sampler.choose(row)
        else:
            choice = sequence.sampler.take(int(row))
    except DmtdError as error:
        return TokenEvent(choice=None, error=error)
    sequence.ids.append(choice.token_id)
    outcome = sequence.stops.push(choice.token_id)
    return TokenEvent(
        choice=choice, text=outcome.text, finish_reason=outcome.finish_reason, stop_reason=outcome.stop_reason
    )


def _end_cancelled(backend: Backend, active: list[SequenceRun]) -> None:
    for sequence in reversed(list(active)):
        if sequence.end_from_outside():
            _leave(backend, active, sequence)


def _leave(backend: Backend, active: list[SequenceRun], sequence: SequenceRun) -> None:
    """Free the slot; the last sequence moves into the gap, so that a smaller batch costs less."""
    slot, last = sequence.slot, active[-1]
    backend.reset(slot, clear=sequence.failed)  # a failed run may have left NaN in the cache
    if last is sequence:
        active.pop()
    elif backend.move(last.slot, slot):
        active[active.index(sequence)] = active.pop()
        last.slot = slot
    else:
        active.remove(sequence)
