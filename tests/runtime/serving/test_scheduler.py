"""The scheduler in pure integers: nobody waits for ever, heads fall together, slots have one owner."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmtd_runtime.bundle.manifest import CycleInfo
from dmtd_runtime.cycle import CONVENTIONS, CyclePlan, Position
from dmtd_runtime.serving.scheduler import Planned, Scheduler
from dmtd_runtime.serving.slots import Move, Slots

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


def made(tau: int = 4, num_slots: int = 4, max_rows: int = 256, **more: object) -> Scheduler:
    return Scheduler(plan_of(tau, **more), num_slots=num_slots, max_rows=max_rows)  # type: ignore[arg-type]


@settings(max_examples=200)
@given(
    tau=st.sampled_from(TAUS),
    convention=st.sampled_from(CONVENTIONS),
    prompt_lens=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    max_rows=st.sampled_from((1, 5, 16, 256)),
    plain=st.booleans(),
)
def test_a_batch_aligns_its_heads_and_starves_nobody(
    tau: int, convention: tuple[str, str], prompt_lens: list[int], max_rows: int, plain: bool
) -> None:
    plan = plan_of(tau, convention, plain=plain)
    scheduler = Scheduler(plan, num_slots=len(prompt_lens), max_rows=max_rows)
    for number, length in enumerate(prompt_lens):
        scheduler.admit(number, length)
    batch = [Position(prompt_len=length) for length in prompt_lens]  # counted here once more
    runs, short_runs = 0, 0
    while any(at.fed < at.prompt_len + 4 * tau for at in batch):
        planned = scheduler.schedule()
        taking_part = [one.slot for one in planned]
        assert taking_part == sorted(set(taking_part)), "the backend needs steps in order of the slots"
        assert taking_part == [one.sequence for one in planned]
        kind = planned[0].step.kind
        assert {one.step.kind for one in planned} == {kind}
        if kind == "prefill":
            assert sum(len(one.step.window) for one in planned) <= max_rows
            assert taking_part[0] == next(i for i, at in enumerate(batch) if at.in_prefill)
        else:
            assert not any(at.in_prefill for at in batch), "a prompt waits while others decode"
            short_runs += len(planned) < len(batch)
            assert kind != "full" or len(planned) == len(batch), "T's weights are read for a part of the batch"
        for one in planned:
            # The step is the one that the sequence would take alone.
            assert one.step == plan.next_step(batch[one.slot], max(len(one.step.window), 1))
            batch[one.slot].commit(one.step)
        scheduler.commit(planned)
        assert scheduler.committed == [at.fed for at in batch]
        runs += 1
    assert short_runs <= tau - 1, "heads that once fell together came apart"
    # All end within a cycle of one another: nobody is starved.
    generated = [at.fed - at.prompt_len for at in batch]
    assert max(generated) - min(generated) <= max(tau - 1, 0)
    assert runs <= sum(prompt_lens) + 6 * tau


def run(scheduler: Scheduler) -> list[Planned]:
    planned = scheduler.schedule()
    scheduler.commit(planned)
    return planned


def test_a_static_batch_ends_before_the_next_one_enters() -> None:
    scheduler = made(num_slots=2)
    for number in range(3):
        scheduler.admit(number, 1)
    assert [one.sequence for one in run(scheduler)] == [0, 1]
    assert scheduler.slot_of(2) is None
    scheduler.free(0)
    assert [one.sequence for one in run(scheduler)] == [1], "a free slot waits for the whole batch"
    scheduler.free(1)
    assert [one.sequence for one in run(scheduler)] == [2]


def test_the_last_sequence_moves_into_a_gap_with_its_rows() -> None:
    scheduler = made(num_slots=3)
    for number, length in enumerate((2, 5, 7)):
        scheduler.admit(number, length)
    run(scheduler)
    assert scheduler.free(0) == Move(source=2, target=0, rows=7)
    assert scheduler.committed == [7, 5, 0]
    assert (scheduler.running, scheduler.slot_of(2)) == ([2, 1], 0)
    assert scheduler.free(1) is None
    assert scheduler.free(1) is None, "once gone it is nobody"
    assert scheduler.committed == [7, 0, 0]


def test_what_was_planned_for_an_earlier_tenant_never_reaches_a_later_one() -> None:
    scheduler = made(num_slots=1)
    scheduler.admit(0, 3)
    stale = scheduler.schedule()
    scheduler.free(0)
    scheduler.admit(1, 5)
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
    assert scheduler.free(1) is None
    scheduler.free(0)
    assert scheduler.schedule() == []


@pytest.mark.parametrize("plain", [False, True])
def test_whole_cycles_only_where_everybody_stands_at_a_head(plain: bool) -> None:
    scheduler = made(tau=3, num_slots=2, convention=("absolute", "cyclical"), plain=plain)
    scheduler.admit(0, 3)
    scheduler.admit(1, 4)
    assert scheduler.schedule_cycle() == [] or not scheduler.running
    run(scheduler)
    if not plain:
        assert scheduler.schedule_cycle() == [], "sequence 1 stands inside a cycle"
        while not scheduler.schedule_cycle():
            run(scheduler)
    planned = scheduler.schedule_cycle()
    assert [len(one.steps) for one in planned] == [3, 3]
    assert all(one.steps[0].kind == "full" for one in planned)
    before = scheduler.committed
    scheduler.commit(planned)
    assert scheduler.committed == [rows + 3 for rows in before]


def test_slots_are_taken_from_the_lowest_on_and_told_apart_by_generation() -> None:
    slots = Slots(2)
    first = slots.take(Position(prompt_len=1))
    assert (first.slot, slots.num_free) == (0, 1)
    slots.free(first)
    second = slots.take(Position(prompt_len=1))
    assert second.slot == 0
    assert second.generation > first.generation
    assert slots.holds(second)
    assert not slots.holds(first)
    with pytest.raises(AssertionError, match="is not generation"):
        slots.free(first)
