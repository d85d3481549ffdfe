"""Which sequences run, and which of their steps come next: every policy, in integers alone.

``admit`` a sequence, ``enter`` those that get a slot, ``schedule`` a run, ``commit`` it once it has run, ``free`` the sequence
when it has ended. Nothing here knows a tensor, a session, a sampler or a thread; what a step is, ``cycle.py`` says.

The policy keeps every running sequence in phase, whoever comes and goes, so that T's weights are read once a cycle for all:

1. While any sequence stands inside a cycle, only those step, and the ones at a head wait. After at most ``cycle_length - 1``
   short runs all heads fall together. Who joins between two heads waits for the next, or takes the late steps that bring it
   there; who leaves a cycle waits for it too; no pass over T is ever run for one alone.
2. A pass at the heads takes all of them, and beside them chunks of the prompts being read: so every running sequence gets a
   cycle for every pass, however many prompts wait.
3. A prompt being read gets rows in every such pass: a floor each, and what is left goes to the one with the least to read.
   Having waited counts as having read, so that a long one is not passed for ever. At most ``max_num_partial_prefills`` are
   read in parts at a time, or as many as fit whole into one pass; the others wait, by priority and then in the order they came.
4. Running sequences wait for a pass with a chunk in it, so the chunk is bounded: ``long_prefill_token_threshold`` rows of an
   empty context, fewer over a long one, whose attention costs more. Alone, prompts get all rows of a pass, one after another.
5. Sequences of one group have the same prompt, so it is read once: the others wait, let others pass, and take its rows over.
6. A slot is given for good: it has room for the longest sequence, so nobody is ever preempted.

A static batch, the limit that benchmarks compare with: sequences enter together when none runs any more, and all prompts are
read before anybody decodes.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dmtd_runtime.cycle import CyclePlan, Position, Step
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.slots import Move, Slots, Tenancy

CHUNK_FLOOR = 16  # rows of a prompt in every pass that it shares; fewer cost as much
CHUNK_BESIDE = 64  # rows of prompts that running sequences wait for, where no option says otherwise
MANY = 9  # running sequences that wait for twice as many: their own steps take longer
CONTEXT_OF_TWICE = 2048  # rows of context over which a row of a prompt costs about twice as much as over none
AGE_ROWS = 16  # what having waited for a pass is worth, in rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What one sequence does next: a step, or the steps of a whole cycle."""

    sequence: int
    tenancy: Tenancy
    steps: Sequence[Step]

    @property
    def slot(self) -> int:
        return self.tenancy.slot

    @property
    def step(self) -> Step:
        """The only step."""
        assert len(self.steps) == 1, "a cycle has several steps"
        return self.steps[0]


@dataclass(slots=True, kw_only=True)
class _Running:
    sequence: int
    position: Position
    tenancy: Tenancy
    priority: int
    order: int
    group: int
    passes: int = 0  # with prompts in them, since it entered

    @property
    def left(self) -> int:
        """Given rows still to read."""
        return max(0, self.position.given_len - self.position.fed)


class Scheduler:
    """Sequences are numbers that the caller chooses; the same one is not admitted twice at a time.

    Args:
        plan: the law of the cycles.
        num_slots: sequences at a time.
        max_rows: rows of one prompt that the backend takes in a pass.
        options: the bounds above.
        static: a static batch.
    """

    def __init__(
        self,
        plan: CyclePlan,
        *,
        num_slots: int,
        max_rows: int,
        options: ServingOptions | None = None,
        static: bool = False,
    ) -> None:
        assert num_slots >= 1 and max_rows >= 1, f"{num_slots} slots and {max_rows} rows make no progress"
        options = options or ServingOptions()
        self._plan, self._max_rows, self._static = plan, max_rows, static
        self._budget = options.max_num_batched_tokens
        self._threshold = options.long_prefill_token_threshold
        self._max_reading = options.max_num_partial_prefills
        self._slots = Slots(num_slots)
        self._orders = itertools.count()
        # Sorted (priority, order, sequence, group, start).
        self._waiting: list[tuple[int, int, int, int, Position]] = []
        self._running: list[_Running] = []  # by slot

    @property
    def committed(self) -> list[int]:
        """Committed rows of every slot, for the backend."""
        return self._slots.committed

    @property
    def running(self) -> list[int]:
        """The sequences that have a slot, by slot."""
        return [entry.sequence for entry in self._running]

    @property
    def has_free_slots(self) -> bool:
        return self._slots.num_free > 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_prompt_tokens(self) -> int:
        return sum(position.given_len for *_, position in self._waiting)

    @property
    def num_reading(self) -> int:
        """Sequences whose prompts are being read."""
        return sum(entry.position.in_prefill for entry in self._running)

    @property
    def can_enter(self) -> bool:
        """Whether a waiting sequence would get a slot."""
        if not (self._waiting and self._slots.num_free):
            return False
        if self._static:
            return not self._running
        if (place := self._next) is None:
            return False
        return self.num_reading < self._max_reading or self._fits(self._waiting[place][-1])

    @property
    def in_phase(self) -> bool:
        """Whether all sequences that decode stand at a head."""
        return all(entry.position.in_prefill or self._at_head(entry) for entry in self._running)

    def slot_of(self, sequence: int) -> int | None:
        """The slot of a sequence; None while it waits."""
        entry = self._entry(sequence)
        return None if entry is None else entry.tenancy.slot

    def position_of(self, sequence: int) -> Position:
        """Where a sequence that has a slot stands."""
        entry = self._entry(sequence)
        assert entry is not None, f"sequence {sequence} has no slot"
        return entry.position

    def admit(self, sequence: int, prompt_len: int, *, given_len: int = 0, priority: int = 0, group: int = 0) -> None:
        """Let a sequence wait for a slot; a lower ``priority`` goes first. ``given_len``: see :class:`Position`.

        ``group``: those of one group have the same prompt; 0: nobody else.
        """
        position = Position(prompt_len=prompt_len, given_len=given_len)
        bisect.insort(self._waiting, (priority, next(self._orders), sequence, group, position))

    def enter(self) -> list[int]:
        """Give slots to waiting sequences, as far as the policy lets them in: which did."""
        entered = []
        together = self._static and not self._running
        while self._waiting and self._slots.num_free and (together or self.can_enter):
            priority, order, sequence, group, position = self._waiting.pop(0 if together else self._next or 0)
            entry = _Running(
                sequence=sequence,
                position=position,
                tenancy=self._slots.take(position),
                priority=priority,
                order=order,
                group=group,
            )
            self._running.append(entry)
            entered.append(sequence)
        self._running.sort(key=lambda entry: entry.tenancy.slot)
        return entered

    def restore(self, sequence: int, rows: int) -> None:
        """Take the first ``rows`` rows of a prompt as read: its slot has them from elsewhere."""
        position = self.position_of(sequence)
        assert position.fed == 0 and 0 <= rows < position.given_len, f"{rows} rows of {position}"
        position.fed = position.thought = rows

    def twin(self, sequence: int) -> Move | None:
        """All but the last row of a prompt that another one of its group, which has a slot, has read; None: there is none."""
        entry = self._entry(sequence)
        assert entry is not None, f"sequence {sequence} has no slot"
        read = (e.tenancy.slot for e in self._running if e.group == entry.group and not e.position.in_prefill)
        source = next(read, None) if entry.group and entry.left > 1 else None
        return source if source is None else Move(source=source, target=entry.tenancy.slot, rows=entry.left - 1)

    def schedule(self, *, heads: bool = True) -> list[Planned]:
        """The next run: late steps by slot, or full ones and then chunks of prompts, each by slot. Empty where nothing is left.

        ``heads=False``: chunks alone, as small as if the heads ran beside them.
        """
        decoding, reading = list[_Running](), list[_Running]()
        for entry in self._running:
            (reading if entry.position.in_prefill else decoding).append(entry)
        inside = [entry for entry in decoding if not self._at_head(entry)]
        if self._static and reading:
            return self._chunks(reading, self._budget or self._max_rows)
        if inside:
            return [self._planned(entry, [self._plan.next_step(entry.position, 1)]) for entry in inside]
        steps = [self._planned(entry, [self._plan.next_step(entry.position, 1)]) for entry in decoding]
        if not reading and heads:
            return steps
        rows = self._max_rows
        if self._budget is not None:
            rows = self._budget - sum(len(planned.step.window) for planned in steps)
        if not heads:
            steps = []
        return steps + self._chunks(reading, rows, beside=len(decoding))

    def schedule_cycle(self) -> list[Planned]:
        """A whole cycle of everybody who decodes, if all stand at a head: then it can run without anybody looking. Else empty.

        In plain mode every position is a head, and a "cycle" is as many full passes.
        """
        decoding = [entry for entry in self._running if not entry.position.in_prefill]
        if not self.in_phase or (self._static and len(decoding) < len(self._running)):
            return []
        return [self._planned(entry, self._plan.cycle_steps(entry.position)) for entry in decoding]

    def commit(self, planned: Iterable[Planned]) -> None:
        """Take the steps as run. Those of a sequence that has left since are dropped."""
        entries = {entry.sequence: entry for entry in self._running}
        ran = list(planned)
        if any(one.steps[0].kind == "prefill" for one in ran):
            for entry in self._running:
                entry.passes += entry.position.in_prefill
        for one in ran:
            living = entries.get(one.sequence)
            if living is not None and living.tenancy == one.tenancy:
                for step in one.steps:
                    living.position.commit(step)

    def leave_cycle(self, sequence: int, take_back: Sequence[Step] = ()) -> None:
        """Let a sequence's next position be a head; ``take_back``: see :meth:`Position.leave_cycle`."""
        assert self._plan.may_leave, "heads stand where the count puts them"
        self.position_of(sequence).leave_cycle(take_back)

    def free(self, sequence: int) -> None:
        """Let a sequence go, waiting or running."""
        entry = self._entry(sequence)
        if entry is None:
            self._waiting = [waiting for waiting in self._waiting if waiting[2] != sequence]
            return
        self._slots.free(entry.tenancy)
        self._running.remove(entry)

    def close_gap(self) -> Move | None:
        """Let the last sequence live in the lowest free slot below it, so that a smaller batch costs less; None: no gap."""
        target = self._slots.lowest_free
        if not self._running or target is None or target > self._running[-1].tenancy.slot:
            return None
        last = self._running[-1]
        last.tenancy, move = self._slots.move(last.tenancy, target)
        self._running.sort(key=lambda entry: entry.tenancy.slot)
        return move

    def _chunks(self, reading: Sequence[_Running], rows: int, *, beside: int = 0) -> list[Planned]:
        """Chunks of prompts, ``rows`` in all, fewer ``beside`` those who run: a floor each, the rest to who has least left."""
        urgent = sorted(reading, key=lambda e: (e.priority, e.left - AGE_ROWS * e.passes, e.order))
        bound = self._beside(beside)
        if beside:
            rows = max(len(urgent), min(rows, bound))
        floor = min(CHUNK_FLOOR, rows // len(urgent)) if beside and urgent else 0
        spare, steps = rows - floor * len(urgent), []
        for entry in urgent:
            most = min(floor + spare, self._max_rows)
            if beside:
                most = max(floor, min(most, bound * CONTEXT_OF_TWICE // (CONTEXT_OF_TWICE + entry.position.fed)))
            if CHUNK_FLOOR < most < entry.left:
                most -= most % CHUNK_FLOOR  # a chunk is padded up to as much
            if (count := min(most, entry.left)) > 0:
                spare -= max(0, count - floor)
                steps.append(self._planned(entry, [self._plan.next_step(entry.position, count)]))
        return sorted(steps, key=lambda planned: planned.slot)

    def _fits(self, position: Position) -> bool:
        """Whether a prompt and what is left of those being read fit whole into one pass; the rows of heads are not counted."""
        left = [entry.left for entry in self._running if entry.position.in_prefill]
        padded = sum(-(-rows // CHUNK_FLOOR) * CHUNK_FLOOR for rows in (*left, position.given_len))
        return padded <= min(self._beside(len(self._running) - len(left)), self._budget or self._max_rows)

    def _beside(self, running: int) -> int:
        """Rows of prompts in a pass that so many sequences wait for."""
        return min(self._threshold or CHUNK_BESIDE * (1 + (running >= MANY)), self._max_rows)

    @property
    def _next(self) -> int | None:
        """The place in the queue of the first whose prompt nobody is reading."""
        reading = {entry.group for entry in self._running if entry.group and entry.position.in_prefill}
        return next((place for place, waiting in enumerate(self._waiting) if waiting[3] not in reading), None)

    def _entry(self, sequence: int) -> _Running | None:
        return next((entry for entry in self._running if entry.sequence == sequence), None)

    def _at_head(self, entry: _Running) -> bool:
        return self._plan.at_head(entry.position)

    @staticmethod
    def _planned(entry: _Running, steps: Sequence[Step]) -> Planned:
        return Planned(sequence=entry.sequence, tenancy=entry.tenancy, steps=steps)
