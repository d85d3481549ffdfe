"""From waiting sequences to finished ones: enter -> schedule -> run -> commit -> choose, one step at a time.

Where the backend runs cycles, and every sequence that decodes stands at a head, whole cycles are enqueued, the next one
before the tokens of this one are looked at, unless somebody waits to join. Ends are then found when a cycle is over: what it
chose behind the end is dropped unseen. Prompts are read between two cycles. Who needs the host for every token takes the same
cycle behind that of the others, step by step: all stay in phase, and T is read twice in such a round.

So is what follows an unsure late step of a sequence that asks for confidence, and where it is too unsure its own choice: its
part of a cycle that was launched ahead is dropped with it. Such a launch costs the sequence a whole cycle's time, where waiting
for the tokens costs the host's: cycles are launched ahead only while most sequences kept the last one whole.

Where cycles do not run ahead of the host, one is run where all take the likeliest tokens, none is certain to end in it and no
prompt is being read, for prompts go with the heads there. Otherwise everybody goes step by step.

What comes next is the scheduler's, numbers are the backend's; here sequences are told of their tokens, and prefixes are kept
and found again. No threads: ``worker.py`` has them.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dmtd_runtime.backends.base import Backend, RunOutput, SlotCycle, SlotStep
from dmtd_runtime.cycle import CyclePlan, Position, Step
from dmtd_runtime.sampling.confidence import ALWAYS, Verdict, confidence
from dmtd_runtime.sampling.sampler import described
from dmtd_runtime.serving.counts import Counts, StepTokens
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.prefix_cache import PrefixCache
from dmtd_runtime.serving.scheduler import Planned, Scheduler
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

SCORED_ROWS = 64  # of a prompt at a time, whose logits are all brought to the host


class Loop:
    """Runs sequences on one backend. Not thread-safe."""

    def __init__(
        self,
        backend: Backend,
        plan: CyclePlan,
        *,
        options: ServingOptions | None = None,
        max_rows: int | None = None,
        static: bool = False,
        closing: Callable[[], bool] = lambda: False,
        arriving: Callable[[], bool] = lambda: False,
        leaving: Callable[[SequenceRun, int, Position], None] = lambda sequence, slot, at: None,
    ) -> None:
        """``max_rows``: of one prompt in a pass; the backend's own limit where that is lower.

        ``static``: sequences enter together when none runs any more. ``closing``: whether who still waits is no longer to
        begin, and ends with ``abort``. ``arriving``: whether somebody is about to be added, so that nothing is run ahead.
        ``leaving``: is told of a sequence that leaves its slot, whose rows still stand there.
        """
        options = options or ServingOptions(prefix_cache_bytes=0)
        self._closing, self._arriving, self._leaving = closing, arriving, leaving
        rows = backend.max_rows if max_rows is None else min(max_rows, backend.max_rows)
        self._backend, self._plan, self._cycle_length = backend, plan, plan.cycle.cycle_length
        self._scheduler = Scheduler(plan, num_slots=backend.slots, max_rows=rows, options=options, static=static)
        self._prefixes = PrefixCache(options.prefix_cache_bytes)
        self._sequences: dict[int, SequenceRun] = {}
        self._numbers = itertools.count()
        self._read_first = False  # whether prompts come before the next cycle
        self._look_ahead = True  # whether most sequences kept the last cycle whole
        self._prompt_tokens = self._chosen = self._looked_up = self._found = 0
        self._head_passes = self._in_phase = self._dropped = 0
        self._step_tokens = StepTokens()

    @property
    def sequences(self) -> list[SequenceRun]:
        """Those that have not left yet, waiting or running."""
        return list(self._sequences.values())

    def add(self, sequence: SequenceRun) -> None:
        """Let a sequence wait for its turn."""
        number = next(self._numbers)
        self._sequences[number] = sequence
        given = len(sequence.ids)
        self._scheduler.admit(
            number, sequence.prompt_len or given, given_len=given, priority=sequence.priority, group=sequence.group
        )

    def step(self) -> None:
        """Let go of who was cancelled, let others in, run what comes next and tell of its tokens.

        Errors of the backend pass through.
        """
        if ended := [number for number, sequence in self._sequences.items() if sequence.end_from_outside()]:
            self._leave(ended)
        if self._closing():
            self._end_waiting()
        if self._scheduler.has_free_slots:
            self._enter()
        if self._sequences and not self._run_cycles():
            self._run(self._scheduler.schedule())

    def counts(self) -> Counts:
        """What goes on now, and what has been done."""
        scheduler, stats = self._scheduler, self._backend.stats
        return Counts(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            waiting_prompt_tokens=scheduler.waiting_prompt_tokens,
            kv_rows=sum(scheduler.committed),
            kv_capacity_rows=self._backend.slots * self._backend.max_model_len,
            prefix_cache_bytes=self._prefixes.num_bytes,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._chosen,
            full_passes=stats.full_passes,
            prefill_passes=stats.prefill_passes,
            late_steps=stats.late_steps,
            refill_rows=stats.refill_rows,
            dropped_tokens=self._dropped,
            head_passes=self._head_passes,
            head_passes_in_phase=self._in_phase,
            prefix_queries=self._looked_up,
            prefix_hits=self._found,
            step_tokens=tuple(self._step_tokens.counts),
            step_tokens_sum=self._step_tokens.sum,
        )

    def _enter(self) -> None:
        """Let waiting sequences have free slots, with what is kept of their prompts, and close the gaps that are left."""
        for number in self._scheduler.enter():
            sequence = self._sequences[number]
            sequence.started = time.monotonic()
            scored = sequence.prompt_logprobs is not None  # every row is to be seen
            rows = 0 if scored else self._restore(number)
            self._scheduler.restore(number, rows)
            sequence.cached_tokens = rows
            self._prompt_tokens += len(sequence.ids)
            self._looked_up += len(sequence.ids)
            self._found += rows
        while (move := self._scheduler.close_gap()) is not None:
            self._backend.move(move.source, move.target, move.rows)

    def _restore(self, number: int) -> int:
        """Put what is known of a prompt into its slot: how many rows."""
        if (twin := self._scheduler.twin(number)) is not None:
            self._backend.move(twin.source, twin.target, twin.rows)
            return twin.rows
        sequence, slot, rows = self._sequences[number], self._slot(number), 0
        prompt_len = sequence.prompt_len or len(sequence.ids)
        known = sequence.ids[: self._plan.lasting_rows(prompt_len, len(sequence.ids))]
        for block in self._prefixes.match(known, sequence.cache_salt):
            self._backend.write_rows(slot, rows, block)
            rows += block.shape[-2]
        return rows

    def _run(self, planned: Sequence[Planned]) -> None:
        """Run one step of the sequences, and tell those that get a token."""
        if not planned:
            return
        self._count_heads(planned)
        self._step_tokens.add(sum(len(one.step.late) for one in planned))
        if planned[-1].step.kind == "prefill":  # prompts stand behind the others
            scored = [one for one in planned if one.step.kind == "prefill" and self._scores(one)]
            for one in scored:
                self._run_scored(one)
            planned = [one for one in planned if one not in scored]
            if not planned:
                return
        steps = [self._slot_step(one) for one in planned]
        wanting = [one for one in planned if one.step.wants_logits]
        wanted = [self._sequences[one.sequence] for one in wanting]
        choose = not any(sequence.sampler.needs_logits or sequence.looks for sequence in wanted)
        output = self._backend.run(steps, self._scheduler.committed, choose=choose)
        self._scheduler.commit(planned)
        found = output.logits if output.tokens is None else output.tokens.tolist()
        assert found is not None, "a run gives tokens or logits"
        for one, sequence, given in zip(wanting, wanted, found, strict=True):
            sequence.count(one.step.kind)
            looked_at = one.step.kind == "late" and sequence.looks
            verdict = sequence.judge(confidence(given)) if looked_at else "keep"
            if verdict == "drop":
                self._scheduler.leave_cycle(one.sequence, [one.step])
                self._dropped += 1
                continue
            (sequence.take if choose else sequence.choose)(given)
            if verdict == "leave" or (one.step.kind == "full" and sequence.min_confidence >= ALWAYS):
                self._scheduler.leave_cycle(one.sequence)
            self._chosen += not sequence.failed
            if one.step.kind == "prefill":
                self._keep(one.sequence)
        if ended := [one.sequence for one, sequence in zip(wanting, wanted, strict=True) if sequence.ended]:
            self._leave(ended)

    def _scores(self, one: Planned) -> bool:
        return self._sequences[one.sequence].prompt_logprobs is not None

    def _run_scored(self, planned: Planned) -> None:
        """Run a chunk of a prompt by itself, with the logits of all its rows: they say how likely each next token was."""
        sequence, step = self._sequences[planned.sequence], planned.step
        committed, num_top, logits = self._scheduler.committed, sequence.prompt_logprobs, None
        assert num_top is not None
        for first in range(step.window.start, step.window.stop, SCORED_ROWS):
            rows = range(first, min(first + SCORED_ROWS, step.window.stop))
            part = slice(first - step.window.start, rows.stop - step.window.start)
            piece = Step(
                kind="prefill",
                window=rows,
                late=rows,
                gate_hidden=step.gate_hidden[part],
                gate_thought=step.gate_thought[part],
                wants_logits=True,
            )
            ids = sequence.ids[rows.start : rows.stop]
            logits = self._backend.run([SlotStep(slot=planned.slot, step=piece, ids=ids)], committed, rows="all").logits
            assert logits is not None, "nothing was to be chosen"
            committed[planned.slot] = rows.stop
            sequence.prompt_choices = sequence.prompt_choices or [None]
            for row, next_id in zip(logits, sequence.ids[rows.start + 1 : rows.stop + 1], strict=False):
                sequence.prompt_choices.append(described(next_id, row, num_top))
        self._scheduler.commit([planned])
        if step.wants_logits and logits is not None:
            sequence.choose(logits[-1])
            self._chosen += not sequence.failed
            self._keep(planned.sequence)
            if sequence.ended:
                self._leave([planned.sequence])

    def _run_cycles(self) -> bool:
        """Run whole cycles until a sequence ends or another one comes, of all that may run them; whether anything ran.

        The cycle after the one under way is enqueued before that one's tokens are known, unless a sequence is certain to end
        or another one needs the host. Prompts and cycles take turns.
        """
        if not self._backend.runs_cycles or not (self._backend.runs_ahead or self._may_wait()):
            return False
        planned, by_steps = list[Planned](), list[Planned]()
        for one in self._scheduler.schedule_cycle():
            sequence = self._sequences[one.sequence]
            stepwise = sequence.sampler.needs_host or sequence.min_confidence >= ALWAYS
            (by_steps if stepwise else planned).append(one)
        running = [self._sequences[one.sequence] for one in planned]
        if not planned:
            return False
        if self._scheduler.num_reading and self._read_first:
            self._read_first = False
            self._run(self._scheduler.schedule(heads=False))
            return True
        self._read_first = True
        self._start_cycle(planned, 0)
        under_way, left = deque([planned]), set[int]()
        while under_way:
            if len(under_way) == 1 and not (by_steps or left) and self._may_follow(running):
                under_way.append(planned := self._scheduler.schedule_cycle())
                self._start_cycle(planned, self._cycle_length)
            output, cycle = self._backend.finish_cycle(), under_way.popleft()
            left |= self._take_cycle(output, cycle, left, under_way)
            self._end_from_outside()
        self._leave(number for number, sequence in self._sequences.items() if sequence.ended)
        self._run_heads(by_steps)
        return True

    def _may_follow(self, running: Sequence[SequenceRun]) -> bool:
        """Whether the next cycle may be enqueued before the tokens of this one are known: nobody waits, and nobody has to end."""
        if not (self._backend.runs_ahead and self._look_ahead) or any(s.ended for s in running):
            return False
        waits = self._scheduler.num_reading or self._scheduler.can_enter or self._arriving()
        return not waits and _go_on(running, self._cycle_length)

    def _may_wait(self) -> bool:
        """Whether cycles may run while the host waits: all take the likeliest tokens, and none is certain to end before its end.

        Where prompts are being read heads take them along, step by step.
        """
        if self._scheduler.num_reading:
            return False
        running = [self._sequences[number] for number in self._scheduler.running]
        likeliest = not any(s.sampler.needs_logits or s.looks or s.min_confidence >= ALWAYS for s in running)
        return likeliest and _go_on(running, self._cycle_length - 1)

    def _take_cycle(
        self, output: RunOutput, cycle: Sequence[Planned], gone: set[int], following: Iterable[Sequence[Planned]]
    ) -> set[int]:
        """Tell sequences of a cycle's tokens, but those that have ``gone`` from the one before. Which left theirs in this one."""
        assert output.tokens is not None, "a cycle gives tokens"
        left, tokens = set[int](), output.tokens.tolist()
        for k, (index, one) in itertools.product(range(self._cycle_length), enumerate(cycle)):
            sequence, step = self._sequences[one.sequence], one.steps[k]
            if sequence.ended or one.sequence in gone | left:
                continue
            sequence.count(step.kind)
            verdict: Verdict = "keep"
            if step.kind == "late" and sequence.looks:
                assert output.confidence is not None, "who looks runs where it is told"
                verdict = sequence.judge(float(output.confidence[k, index]))
            if verdict != "drop":
                sequence.take(tokens[k][index])
                self._chosen += not sequence.failed
            self._dropped += verdict == "drop"
            kept = k + (verdict != "drop")
            if verdict != "keep" and kept < self._cycle_length:  # behind its last step a cycle ends anyway
                behind = [s for ahead in following for o in ahead if o.sequence == one.sequence for s in o.steps]
                self._scheduler.leave_cycle(one.sequence, [*one.steps[kept:], *behind])
                left.add(one.sequence)
        self._look_ahead = 2 * len(left) < len(cycle)
        return left

    def _run_heads(self, planned: Sequence[Planned]) -> None:
        """Run the full steps of cycles that the others are ahead by. What is left of them the scheduler lets catch up."""
        for steps in zip(*(one.steps for one in planned), strict=True):
            if steps[0].kind == "full":
                pairs = zip(planned, steps, strict=True)
                self._run([replace(one, steps=[step]) for one, step in pairs if one.sequence in self._sequences])

    def _start_cycle(self, planned: Sequence[Planned], unseen: int) -> None:
        """Enqueue a cycle and take its steps as run. ``unseen``: tokens of a cycle under way, which this one follows."""
        cycles = []
        for one in planned:
            sequence, window = self._sequences[one.sequence], one.steps[0].window
            ids = () if unseen else sequence.ids[window.start : window.stop]
            cycles.append(SlotCycle(slot=one.slot, steps=one.steps, ids=ids, sampler=sequence.sampler, unseen=unseen))
        self._count_heads(planned)
        self._step_tokens.add(len(planned), steps=len(planned[0].steps))
        self._backend.start_cycle(cycles, self._scheduler.committed, follows=unseen > 0)
        self._scheduler.commit(planned)

    def _count_heads(self, planned: Sequence[Planned]) -> None:
        heads = max(sum(step.kind == "full" for step in one.steps) for one in planned)
        self._head_passes += heads
        self._in_phase += heads * self._scheduler.in_phase

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
        """Let sequences go."""
        for number in list(numbers):
            slot = self._scheduler.slot_of(number)
            if slot is not None:
                self._leaving(self._sequences[number], slot, self._scheduler.position_of(number))
            if slot is not None and self._sequences[number].failed:  # it may have left NaN in the caches
                self._backend.clear(slot, self._scheduler.committed[slot])
            elif slot is not None:
                self._keep(number)
            self._scheduler.free(number)
            del self._sequences[number]

    def _keep(self, number: int) -> None:
        """Keep the rows of a sequence that other prompts may begin with."""
        sequence, slot = self._sequences[number], self._slot(number)
        if not sequence.failed:
            # Cycles that go on behind the end have rows of tokens that nobody saw; where they do not the last one has none.
            at = self._scheduler.position_of(number)
            rows = self._plan.lasting_rows(at.prompt_len, min(at.thought, len(sequence.ids) - 1))
            self._prefixes.add(
                sequence.ids[:rows], sequence.cache_salt, lambda rows: self._backend.read_rows(slot, rows)
            )

    def _slot(self, number: int) -> int:
        slot = self._scheduler.slot_of(number)
        assert slot is not None, f"sequence {number} has no slot"
        return slot

    def _slot_step(self, one: Planned) -> SlotStep:
        ids = self._sequences[one.sequence].ids
        return SlotStep(slot=one.slot, step=one.step, ids=ids[_first(one.step) : one.step.late.stop])


def run_batch(
    backend: Backend,
    plan: CyclePlan,
    sequences: Sequence[SequenceRun],
    *,
    max_rows: int | None = None,
    static: bool = True,
    leaving: Callable[[SequenceRun, int, Position], None] = lambda sequence, slot, at: None,
) -> None:
    """Run ``sequences`` to their ends, as a static batch. Errors of the backend itself pass through."""
    loop = Loop(backend, plan, max_rows=max_rows, static=static, leaving=leaving)
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
