"""The scheduler in pure integers: nobody waits for ever, heads fall together, slots have one owner."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmtd_runtime.bundle.manifest import CycleInfo
from dmtd_runtime.cycle import CONVENTIONS, CyclePlan, Position
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.scheduler import CHUNK_BESIDE, Planned, Scheduler
from dmtd_runtime.serving.slots import Move

TAUS = (1, 2, 3, 4, 8, 256)


def plan_of(tau: int, convention: tuple[str, str] = ("prompt", "thinking"), *, plain: bool = False) -> CyclePlan:
    cycle = CycleInfo(
        encoding_layers=0,
        thinking_layers=3,
        decoding_layers=2,
        cycle_length=tau,
        cycle_origin=convention[0],  # type: ignore[arg-type]
        prompt_input=convention[1],  # type: ignore[arg-type]
        dmtd_trained=True,
    )
    return CyclePlan(cycle=cycle, plain=plain)


def made(
    tau: int = 4, num_slots: int = 4, max_rows: int = 256, *, static: bool = False, reading: int = 2, **more: object
) -> Scheduler:
    options = ServingOptions(max_num_partial_prefills=reading)
    plan = plan_of(tau, **more)  # type: ignore[arg-type]
    return Scheduler(plan, num_slots=num_slots, max_rows=max_rows, options=options, static=static)


def run(scheduler: Scheduler) -> list[Planned]:
    scheduler.enter()
    planned = scheduler.schedule()
    scheduler.commit(planned)
    return planned


@settings(max_examples=100)
@given(
    tau=st.sampled_from(TAUS),
    convention=st.sampled_from(CONVENTIONS),
    prompt_lens=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    max_rows=st.sampled_from((1, 5, 16, 256)),
    plain=st.booleans(),
)
def test_a_static_batch_aligns_its_heads_and_starves_nobody(
    tau: int, convention: tuple[str, str], prompt_lens: list[int], max_rows: int, plain: bool
) -> None:
    plan = plan_of(tau, convention, plain=plain)
    scheduler = Scheduler(plan, num_slots=len(prompt_lens), max_rows=max_rows, static=True)
    for number, length in enumerate(prompt_lens):
        scheduler.admit(number, length)
    batch = [Position(prompt_len=length) for length in prompt_lens]  # counted here once more
    runs, short_runs = 0, 0
    while any(at.fed < at.prompt_len + 4 * tau for at in batch):
        planned = run(scheduler)
        taking_part = [one.slot for one in planned]
        assert taking_part == sorted(set(taking_part)), "the backend needs steps in order of the slots"
        assert taking_part == [one.sequence for one in planned]
        kind = planned[0].step.kind
        assert {one.step.kind for one in planned} == {kind}
        if kind == "prefill":
            assert sum(len(one.step.window) for one in planned) <= max_rows
        else:
            assert not any(at.in_prefill for at in batch), "a prompt waits while others decode"
            short_runs += len(planned) < len(batch)
            assert kind != "full" or len(planned) == len(batch), "T's weights are read for a part of the batch"
        for one in planned:
            # The step is the one that the sequence would take alone.
            assert one.step == plan.next_step(batch[one.slot], max(len(one.step.window), 1))
            batch[one.slot].commit(one.step)
        assert scheduler.committed == [at.fed for at in batch]
        runs += 1
    assert short_runs <= tau - 1, "heads that once fell together came apart"
    # All end within a cycle of one another: nobody is starved.
    generated = [at.fed - at.prompt_len for at in batch]
    assert max(generated) - min(generated) <= max(tau - 1, 0)
    assert runs <= sum(prompt_lens) + 6 * tau


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
        self.tokens = self.heads = 0

    def come(self, number: int, prompt_len: int, tokens: int, priority: int = 0) -> None:
        self.prompts[number], self.wants[number] = prompt_len, tokens
        self.scheduler.admit(number, prompt_len, priority=priority)

    def step(self) -> None:
        for number in self.scheduler.enter():
            self.at[number] = Position(prompt_len=self.prompts[number])
        while (move := self.scheduler.close_gap()) is not None:
            [mover] = [n for n in self.at if self.slots.get(n) == move.source]
            assert move.rows == self.at[mover].fed
            assert move.target < move.source
        self.slots = {number: self._slot(number) for number in self.at}
        assert sorted(self.slots.values()) == list(range(len(self.slots))), "no gap is left, no slot has two tenants"
        assert sum(at.in_prefill for at in self.at.values()) <= self.options.max_num_partial_prefills
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
            beside = min(self.options.long_prefill_token_threshold or CHUNK_BESIDE, self.max_rows)
            assert sum(chunks) <= max(beside, len(chunks)), "running sequences wait for too large a chunk"
            heads = sum(len(one.step.window) for one in planned) - sum(chunks)
            budget = self.options.max_num_batched_tokens or self.max_rows
            assert sum(chunks) <= max(len(chunks), budget - heads)
        else:
            assert sum(chunks) <= max(self.options.max_num_batched_tokens or self.max_rows, 1)


COMINGS_AND_GOINGS = given(
    data=st.data(),
    tau=st.sampled_from(TAUS),
    convention=st.sampled_from(CONVENTIONS),
    plain=st.booleans(),
    num_slots=st.integers(1, 9),
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
    number = 0
    for _ in range(data.draw(st.integers(1, 12))):
        for _ in range(data.draw(st.integers(0, 4))):
            prompt_len, tokens = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 3 * min(tau, 8)))
            service.come(number, prompt_len, tokens, data.draw(st.integers(0, 2)))
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


test_whoever_comes_and_goes_heads_fall_together_and_nobody_waits_for_ever = settings(max_examples=40)(
    COMINGS_AND_GOINGS(whoever_comes_and_goes)
)
test_whoever_comes_and_goes_in_many_cases = pytest.mark.slow(
    settings(max_examples=2000)(COMINGS_AND_GOINGS(whoever_comes_and_goes))
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


def test_a_long_prompt_is_not_passed_for_ever() -> None:
    scheduler = made(num_slots=4, tau=1)
    scheduler.admit(0, 1)
    run(scheduler)
    scheduler.admit(1, 4000)
    short, passes = 2, 0
    while scheduler.slot_of(1) is None or scheduler.position_of(1).in_prefill:
        if not scheduler.num_waiting:
            scheduler.admit(short, 100)
            short += 1
        run(scheduler)
        passes += 1
        for number in [n for n in scheduler.running if n > 1 and not scheduler.position_of(n).in_prefill]:
            scheduler.free(number)
    # At 16 rows a pass it takes 250: having waited, it gets more.
    assert passes < 240


def test_a_chunk_is_smaller_over_a_long_context() -> None:
    scheduler = made(num_slots=2)
    scheduler.admit(0, 1)
    run(scheduler)
    scheduler.admit(1, 6000)
    rows = []
    while not rows or scheduler.position_of(1).in_prefill:
        rows += [len(one.step.window) for one in run(scheduler) if one.step.kind == "prefill"]
    assert rows[0] == 64
    assert rows[:-1] == sorted(rows[:-1], reverse=True)
    assert rows[-2] == 16


def test_alone_a_prompt_gets_the_whole_pass() -> None:
    scheduler = made()
    scheduler.admit(0, 300)
    scheduler.admit(1, 10)
    assert [(one.sequence, len(one.step.window)) for one in run(scheduler)] == [(0, 240), (1, 10)]


def test_priority_goes_before_the_order_of_coming() -> None:
    scheduler = made(num_slots=1)
    for number, priority in enumerate((1, 1, 0, -3)):
        scheduler.admit(number, 1, priority=priority)
    order = []
    for _ in range(4):
        order += scheduler.enter()
        scheduler.free(order[-1])
    assert order == [3, 2, 0, 1]


def test_rows_that_come_from_elsewhere_are_not_read_again() -> None:
    scheduler = made()
    scheduler.admit(0, 40)
    [entered] = scheduler.enter()
    scheduler.restore(entered, 32)
    [planned] = scheduler.schedule()
    assert planned.step.window == range(32, 40)
    assert scheduler.committed[0] == 32


def test_a_static_batch_ends_before_the_next_one_enters() -> None:
    scheduler = made(num_slots=2, static=True)
    for number in range(3):
        scheduler.admit(number, 1)
    assert [one.sequence for one in run(scheduler)] == [0, 1]
    assert scheduler.slot_of(2) is None
    scheduler.free(0)
    assert [one.sequence for one in run(scheduler)] == [1], "a free slot waits for the whole batch"
    scheduler.free(1)
    assert [one.sequence for one in run(scheduler)] == [2]


def test_the_last_sequence_moves_into_a_gap_with_its_rows() -> None:
    scheduler = made(num_slots=3, reading=3)
    for number, length in enumerate((2, 5, 7)):
        scheduler.admit(number, length)
    run(scheduler)
    scheduler.free(0)
    assert scheduler.close_gap() == Move(source=2, target=0, rows=7)
    assert scheduler.committed == [7, 5, 0]
    assert (scheduler.running, scheduler.slot_of(2)) == ([2, 1], 0)
    scheduler.free(1)
    scheduler.free(1)  # once gone it is nobody
    assert scheduler.close_gap() is None
    assert scheduler.committed == [7, 0, 0]


def test_a_newcomer_takes_the_gap_before_anybody_moves() -> None:
    scheduler = made(num_slots=2)
    for number in range(3):
        scheduler.admit(number, 1)
        run(scheduler)
    scheduler.free(0)
    assert scheduler.enter() == [2]
    assert scheduler.slot_of(2) == 0
    assert scheduler.close_gap() is None


def test_what_was_planned_for_an_earlier_tenant_never_reaches_a_later_one() -> None:
    scheduler = made(num_slots=1)
    scheduler.admit(0, 3)
    scheduler.enter()
    stale = scheduler.schedule()
    scheduler.free(0)
    scheduler.admit(1, 5)
    scheduler.enter()
    fresh = scheduler.schedule()
    assert stale[0].slot == fresh[0].slot
    scheduler.commit(stale)
    assert scheduler.committed == [0], "the rows of one who left"
    scheduler.commit(fresh)
    assert scheduler.committed == [5]


def test_a_waiting_sequence_may_leave() -> None:
    scheduler = made(num_slots=1)
    scheduler.admit(0, 1)
    scheduler.admit(1, 1)
    run(scheduler)
    scheduler.free(1)
    scheduler.free(0)
    assert scheduler.enter() == []
    assert scheduler.schedule() == []


@pytest.mark.parametrize("plain", [False, True])
def test_whole_cycles_only_where_everybody_stands_at_a_head(plain: bool) -> None:
    scheduler = made(tau=3, num_slots=3, convention=("absolute", "cyclical"), plain=plain)
    scheduler.admit(0, 3)
    scheduler.admit(1, 4)
    assert scheduler.schedule_cycle() == []
    run(scheduler)
    if not plain:
        assert scheduler.schedule_cycle() == [], "sequence 1 stands inside a cycle"
        while not scheduler.schedule_cycle():
            run(scheduler)
    scheduler.admit(2, 100)
    scheduler.enter()
    planned = scheduler.schedule_cycle()
    assert [(one.sequence, len(one.steps)) for one in planned] == [(0, 3), (1, 3)], "a prompt is no part of a cycle"
    assert all(one.steps[0].kind == "full" for one in planned)
    before = scheduler.committed
    scheduler.commit(planned)
    assert scheduler.committed == [*(rows + 3 for rows in before[:2]), 0]
    [chunk] = scheduler.schedule(heads=False)
    assert (chunk.sequence, len(chunk.step.window)) == (2, 64)
