"""Which sequences run, and which of their steps come next: every policy, in integers alone.

``admit`` a sequence, ``schedule`` a run, ``commit`` it once it has run, ``free`` the sequence when it has ended. Nothing here
knows a tensor, a session, a sampler or a thread; what a step is, ``cycle.py`` says.

The policy is that of a static batch. Waiting sequences enter together, in the order they came, when none runs any more. Prompts
are read first, as many chunks as a pass has rows for. Then, while any sequence stands inside a cycle, only those step, and the
ones at a head wait: after at most ``cycle_length - 1`` short runs all heads fall together, for good, and T's weights are read
once a cycle for the whole batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dmtd_runtime.cycle import CyclePlan, Position, Step
from dmtd_runtime.serving.slots import Move, Slots, Tenancy


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


class Scheduler:
    """Sequences are numbers that the caller chooses; the same one is not admitted twice at a time.

    Args:
        plan: the law of the cycles.
        num_slots: sequences at a time.
        max_rows: rows of a pass over prompts.
    """

    def __init__(self, plan: CyclePlan, *, num_slots: int, max_rows: int) -> None:
        assert num_slots >= 1 and max_rows >= 1, f"{num_slots} slots and {max_rows} rows make no progress"
        self._plan, self._max_rows = plan, max_rows
        self._slots = Slots(num_slots)
        self._waiting: deque[tuple[int, int]] = deque()  # (sequence, prompt_len)
        self._running: list[_Running] = []  # by slot

    @property
    def committed(self) -> list[int]:
        """Committed rows of every slot, for the backend."""
        return self._slots.committed

    @property
    def running(self) -> list[int]:
        """The sequences that have a slot, by slot."""
        return [entry.sequence for entry in self._running]

    def slot_of(self, sequence: int) -> int | None:
        """The slot of a sequence; None while it waits."""
        return next((entry.tenancy.slot for entry in self._running if entry.sequence == sequence), None)

    def admit(self, sequence: int, prompt_len: int) -> None:
        """Let a sequence wait for a slot."""
        self._waiting.append((sequence, prompt_len))

    def schedule(self) -> list[Planned]:
        """The next run, by slot: steps of one kind. Empty where nothing is left to do."""
        if not self._running:
            self._enter()
        steps: list[Planned] = []
        rows = self._max_rows
        for entry in self._running:
            if entry.position.in_prefill and rows > 0:
                step = self._plan.next_step(entry.position, rows)
                rows -= len(step.window)
                steps.append(self._planned(entry, [step]))
        if steps:
            return steps
        inside = [entry for entry in self._running if not self._at_head(entry)]
        return [self._planned(entry, [self._plan.next_step(entry.position, rows)]) for entry in inside or self._running]

    def schedule_cycle(self) -> list[Planned]:
        """A whole cycle of everybody, if all stand at a head: then it can run without anybody looking. Else empty.

        In plain mode every position is a head, and a "cycle" is as many full passes.
        """
        if any(entry.position.in_prefill or not self._at_head(entry) for entry in self._running):
            return []
        return [self._planned(entry, self._plan.cycle_steps(entry.position)) for entry in self._running]

    def commit(self, planned: Iterable[Planned]) -> None:
        """Take the steps as run. Those of a sequence that has left since are dropped."""
        positions = {entry.tenancy: entry.position for entry in self._running}
        for one in planned:
            if (position := positions.get(one.tenancy)) is not None:
                for step in one.steps:
                    position.commit(step)

    def free(self, sequence: int) -> Move | None:
        """Let a sequence go, waiting or running. The last one moves into the gap, so that a smaller batch costs less."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != sequence)
        index = next((i for i, entry in enumerate(self._running) if entry.sequence == sequence), None)
        if index is None:
            return None
        gap, last = self._running[index], self._running[-1]
        self._slots.free(gap.tenancy)
        if gap is last:
            self._running.pop()
            return None
        last.tenancy, move = self._slots.move(last.tenancy, gap.tenancy.slot)
        self._running[index] = self._running.pop()
        return move

    def _enter(self) -> None:
        while self._waiting and self._slots.num_free:
            sequence, prompt_len = self._waiting.popleft()
            position = Position(prompt_len=prompt_len)
            self._running.append(_Running(sequence=sequence, position=position, tenancy=self._slots.take(position)))

    def _at_head(self, entry: _Running) -> bool:
        return self._plan.is_head(entry.position.fed, entry.position.prompt_len)

    @staticmethod
    def _planned(entry: _Running, steps: Sequence[Step]) -> Planned:
        return Planned(sequence=entry.sequence, tenancy=entry.tenancy, steps=steps)
