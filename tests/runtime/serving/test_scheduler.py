"""The scheduler in pure integers: nobody waits for ever, heads fall together, slots have one owner."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_support import TAUS, plan_of

from dmtd_runtime.cycle import CONVENTIONS, Position
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.scheduler import Planned, Scheduler
from dmtd_runtime.serving.slots import Move


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
