"""Sequences that come and go, in pure integers: heads fall together, nobody waits for ever, a prompt costs little."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_support import TAUS, plan_of

from dmtd_runtime.cycle import CONVENTIONS, CyclePlan, Position
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.scheduler import CHUNK_BESIDE, MANY, Planned, Scheduler


class Service:
    """Sequences that come and go, each counted once more beside the scheduler: what every run must keep to."""

    def __init__(
        self, plan: CyclePlan, num_slots: int, max_rows: int, options: ServingOptions, leaving: Random | None = None
    ) -> None:
        self.leaving = leaving  # who leaves a cycle, and whether it takes its late step back, is drawn from it
        self.dropped = 0
        self.plan, self.max_rows, self.options = plan, max_rows, options
        self.scheduler = Scheduler(plan, num_slots=num_slots, max_rows=max_rows, options=options)
        self.at: dict[int, Position] = {}  # of those with a slot
        self.wants: dict[int, int] = {}  # tokens to make
        self.since_head: dict[int, int] = {}  # passes over T since the sequence took part in one
        self.slots: dict[int, int] = {}
        self.prompts: dict[int, int] = {}
        self.groups: dict[int, int] = {}
        self.tokens = self.heads = 0

    def come(self, number: int, prompt_len: int, tokens: int, priority: int = 0, group: int = 0) -> None:
        self.prompts[number], self.wants[number], self.groups[number] = prompt_len, tokens, group
        self.scheduler.admit(number, prompt_len, priority=priority, group=group)

    def step(self) -> None:
        entered = self.scheduler.enter()
        for number in entered:
            self.at[number] = Position(prompt_len=self.prompts[number])
            twins = [n for n, at in self.at.items() if self.groups[n] and self._twins(n, number) and not at.in_prefill]
            copy = self.scheduler.twin(number)
            assert (copy is not None) == bool(twins and self.prompts[number] > 1)
            if copy is not None:
                assert copy.source in map(self._slot, twins) and copy.target == self._slot(number)
                assert copy.rows == self.prompts[number] - 1, "the last row is always computed"
                self.scheduler.restore(number, copy.rows)
                self.at[number].fed = self.at[number].thought = copy.rows
        while (move := self.scheduler.close_gap()) is not None:
            [mover] = [n for n in self.at if self.slots.get(n) == move.source]
            assert move.rows == self.at[mover].fed
            assert move.target < move.source
        self.slots = {number: self._slot(number) for number in self.at}
        assert sorted(self.slots.values()) == list(range(len(self.slots))), "no gap is left, no slot has two tenants"
        left = [at.prompt_len - at.fed for at in self.at.values() if at.in_prefill]
        most = min(self._beside, self.options.max_num_batched_tokens or self.max_rows)
        fitting = sum(-(-n // 16) * 16 for n in left) <= most
        assert not entered or fitting or len(left) <= self.options.max_num_partial_prefills
        read = [self.groups[n] for n, at in self.at.items() if at.in_prefill and self.groups[n]]
        assert len(read) == len(set(read)), "a prompt is read twice at a time"
        planned = self.scheduler.schedule()
        assert planned, "somebody has a slot, so something runs"
        self._check(planned)
        for one in planned:
            self.at[one.sequence].commit(one.step)
        self.scheduler.commit(planned)
        for one in planned:
            if self.leaving is not None and one.step.kind != "prefill" and self.leaving.random() < 0.3:
                take_back = one.step.kind == "late" and self.leaving.random() < 0.5
                back = [one.step] if take_back else []
                self.at[one.sequence].leave_cycle(back)
                self.scheduler.leave_cycle(one.sequence, back)
                self.dropped += take_back
        for number, at in list(self.at.items()):
            if at.fed - at.prompt_len >= self.wants[number]:
                self.leave(number)

    def leave(self, number: int) -> None:
        if number in self.at:
            self.tokens += max(0, self.at.pop(number).fed - self.prompts[number])
        self.scheduler.free(number)
        self.slots.pop(number, None)
        del self.wants[number]

    @property
    def _beside(self) -> int:
        usual = CHUNK_BESIDE * (2 if sum(not at.in_prefill for at in self.at.values()) >= MANY else 1)
        return min(self.options.long_prefill_token_threshold or usual, self.max_rows)

    def _twins(self, one: int, other: int) -> bool:
        return one != other and self.groups[one] == self.groups[other]

    def _slot(self, number: int) -> int:
        slot = self.scheduler.slot_of(number)
        assert slot is not None
        return slot

    def _check(self, planned: list[Planned]) -> None:
        order = [(one.step.kind == "prefill", one.slot) for one in planned]
        assert order == sorted(set(order)), "heads by slot, then prompts by slot"
        taking_part = {one.sequence for one in planned}
        reading = {number for number, at in self.at.items() if at.in_prefill}
        decoding = self.at.keys() - reading
        for one in planned:
            at = self.at[one.sequence]
            assert one.slot == self.slots[one.sequence]
            assert one.step == self.plan.next_step(at, max(len(one.step.window), 1)), "the law knows no neighbours"
        kinds = {one.step.kind for one in planned}
        if "late" in kinds:
            inside = {n for n in decoding if not self.plan.at_head(self.at[n])}
            assert kinds == {"late"}
            assert taking_part == inside, "only those inside a cycle step, and all of them"
            return
        assert decoding <= taking_part, "T's weights are read for a part of those who decode"
        chunks = [len(one.step.window) for one in planned if one.step.kind == "prefill"]
        assert all(rows <= self.max_rows for rows in chunks)
        if decoding:
            self.heads += 1
            assert reading <= taking_part, "a prompt is passed over"
            assert sum(chunks) <= max(self._beside, len(chunks)), "running sequences wait for too large a chunk"
            heads = sum(len(one.step.window) for one in planned) - sum(chunks)
            if (budget := self.options.max_num_batched_tokens) is not None:
                assert sum(chunks) <= max(len(chunks), budget - heads)
        else:
            assert sum(chunks) <= max(self.options.max_num_batched_tokens or self.max_rows, 1)


COMINGS_AND_GOINGS = given(
    data=st.data(),
    tau=st.sampled_from(TAUS),
    convention=st.sampled_from(CONVENTIONS),
    plain=st.booleans(),
    num_slots=st.sampled_from((1, 2, 3, 5, 9, 17)),
    max_rows=st.sampled_from((1, 5, 64, 256)),
    options=st.builds(
        ServingOptions,
        max_num_batched_tokens=st.sampled_from((None, 1, 40, 512)),
        long_prefill_token_threshold=st.sampled_from((None, 1, 32, 200)),
        max_num_partial_prefills=st.integers(1, 4),
    ),
)


def whoever_comes_and_goes(
    data: st.DataObject,
    tau: int,
    convention: tuple[str, str],
    plain: bool,
    num_slots: int,
    max_rows: int,
    options: ServingOptions,
) -> None:
    leaving = Random(data.draw(st.integers(0, 1 << 20))) if convention[0] == "prompt" else None
    service = Service(plan_of(tau, convention, plain=plain), num_slots, max_rows, options, leaving)
    rows = min(max_rows, options.max_num_batched_tokens or 300, options.long_prefill_token_threshold or 300)
    longest = 300 if rows > 1 else 40  # whatever is read row by row takes as many steps
    number = 0
    for _ in range(data.draw(st.integers(1, 12))):
        for _ in range(data.draw(st.integers(0, 4))):
            prompt_len, tokens = data.draw(st.integers(1, longest)), data.draw(st.integers(1, 3 * min(tau, 8)))
            group = data.draw(st.sampled_from((0, 0, 0, 1, longest // 2)))  # whose prompts are of so many tokens
            service.come(number, group or prompt_len, tokens, data.draw(st.integers(0, 2)), group)
            number += 1
        for _ in range(data.draw(st.integers(0, 30))):
            if service.wants:
                service.step()
        if service.wants and data.draw(st.booleans()):
            service.leave(data.draw(st.sampled_from(sorted(service.wants))))
    steps = 0
    while service.wants:
        service.step()
        steps += 1
        assert steps <= 300 * (number + 1) + 40 * tau * (number + 1), "somebody waits for ever"
    assert service.scheduler.committed == [0] * num_slots, "a slot has leaked"
    assert service.scheduler.num_waiting == 0
    assert service.heads <= service.tokens, "a pass at the heads that made no token"


test_whoever_comes_and_goes_heads_fall_together_and_nobody_waits_for_ever = settings(max_examples=120)(
    COMINGS_AND_GOINGS(whoever_comes_and_goes)
)
test_whoever_comes_and_goes_in_many_cases = pytest.mark.slow(
    settings(max_examples=100_000)(COMINGS_AND_GOINGS(whoever_comes_and_goes))
)


def test_a_newcomer_costs_no_pass_over_the_thinking_layers_of_its_own() -> None:
    """Under load a full pass is run once for every ``tau`` tokens of a sequence, and prompts ride it."""
    tau = 4
    service = Service(plan_of(tau), 8, 256, ServingOptions())
    number, passes = 0, 0
    for _ in range(400):
        while service.scheduler.num_waiting < 4:
            service.come(number, 30 + number % 50, 40 + number % 30)
            number += 1
        heads = service.heads
        service.step()
        passes += service.heads > heads
    running_tokens = service.tokens + sum(max(0, at.fed - at.prompt_len) for at in service.at.values())
    assert passes <= 1.1 * running_tokens / tau / 6, "at least six of eight slots decode in every pass"


# CPU milliseconds of runtime/README.md, "Under load": of the full pass and a late step by sequences in phase, and what a row of
# a prompt adds, and a row of context that a chunk stands over.
FULL_MS, LATE_MS = {1: 78, 4: 107, 8: 176, 16: 249}, {1: 27, 4: 32, 8: 43, 16: 60}
ROW_MS, CONTEXT_ROW_MS = 3.3, 0.04


@pytest.mark.parametrize("running", [1, 4, 8, 16])
def test_long_prompts_keep_no_stream_waiting(running: int) -> None:
    """While prompts of 4,000 tokens keep coming, no gap between two tokens of a stream is four cycles without them."""
    tau = 4
    scheduler = Scheduler(plan_of(tau), num_slots=running + 4, max_rows=256)
    for number in range(running):
        scheduler.admit(number, 1)
    while len(scheduler.running) < running or scheduler.num_reading:
        scheduler.enter()
        scheduler.commit(scheduler.schedule())
    cycle_ms, worst_ms, read = FULL_MS[running] + (tau - 1) * LATE_MS[running], 0.0, 0
    for number in range(running, running + 6):
        scheduler.admit(number, 4000)
    while scheduler.num_waiting or scheduler.num_reading:
        scheduler.enter()
        planned = scheduler.schedule()
        chunks = [one.step.window for one in planned if one.step.kind == "prefill"]
        if chunks:  # each padded, over its own context
            padded = [-(-len(rows) // 16) * 16 for rows in chunks]
            twice = [1 + rows.start / 3200 for rows in chunks]
            added = sum(ROW_MS * n * more for n, more in zip(padded, twice, strict=True))
            worst_ms = max(worst_ms, FULL_MS[running] + added + sum(CONTEXT_ROW_MS * rows.start for rows in chunks))
        read += sum(map(len, chunks))
        scheduler.commit(planned)
        for number in [n for n in scheduler.running if n >= running and not scheduler.position_of(n).in_prefill]:
            scheduler.free(number)
    assert read == 6 * 4000
    assert worst_ms < 4 * cycle_ms
