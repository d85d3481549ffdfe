"""CyclePlan against the oracle's own rules and against tables written by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_support import CONVENTIONS

from dmtd_models.config.model import DmtdSpec
from dmtd_models.reference import oracle
from dmtd_runtime.bundle.manifest import CycleInfo
from dmtd_runtime.cycle import CyclePlan, Position, Step
from dmtd_runtime.errors import BundleError

TAUS = range(1, 7)


def plan_of(tau: int, convention: tuple[str, str], *, plain: bool = False) -> CyclePlan:
    origin, prompt_input = convention
    cycle = CycleInfo(
        encoding_layers=0,
        thinking_layers=3,
        decoding_layers=2,
        cycle_length=tau,
        cycle_origin=origin,
        prompt_input=prompt_input,
        dmtd_trained=True,
    )
    return CyclePlan(cycle=cycle, plain=plain)


def spec_of(tau: int, convention: tuple[str, str]) -> DmtdSpec:
    origin, prompt_input = convention
    return DmtdSpec(
        encoding_layers=0,
        thinking_layers=3,
        decoding_layers=2,
        cycle_length=tau,
        cycle_origin=origin,
        prompt_input=prompt_input,
        trained=True,
        convention_recorded=True,
    )


def steps_of(plan: CyclePlan, prompt_len: int, total_len: int, max_rows: int = 256) -> list[Step]:
    """Every step until ``total_len`` tokens are fed, alone in its batch, with what must hold of each."""
    at, steps = Position(prompt_len=prompt_len), []
    while at.fed < total_len:
        step = plan.next_step(at, max_rows)
        assert step.late.start == at.fed
        assert len(step.gate_hidden) == len(step.gate_thought) == len(step.late) >= 1
        if step.window:
            assert step.window.start == at.thought, "T's window has a gap or goes over rows twice"
            assert step.window.stop == step.late.stop, "D's rows are not the tail of T's window"
            assert len(step.window) <= max_rows or step.kind == "full"
        at.commit(step)
        assert 0 <= at.fed - at.thought <= (0 if plan.plain else plan.cycle.cycle_length - 1)
        steps.append(step)
    return steps


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("convention", CONVENTIONS, ids="+".join)
@pytest.mark.parametrize("tau", TAUS)
def test_gates_and_rows_are_the_oracles(tau: int, convention: tuple[str, str], plain: bool) -> None:
    plan, spec = plan_of(tau, convention, plain=plain), spec_of(tau, convention)
    for prompt_len, max_rows in itertools.product(range(1, 41), (256, 7, 1)):
        total_len = prompt_len + 2 * tau + 3
        steps = steps_of(plan, prompt_len, total_len, max_rows)
        hidden, thought = oracle.gates(spec, prompt_len=prompt_len, total_len=total_len, plain=plain)
        assert [gate for step in steps for gate in step.gate_hidden] == hidden.astype(bool).tolist()
        assert [gate for step in steps for gate in step.gate_thought] == thought.astype(bool).tolist()
        # Chunks change the cut, never the rows: each goes through D once, in order, and so through T as far as it goes.
        assert [row for step in steps for row in step.late] == list(range(total_len))
        windows = [row for step in steps for row in step.window]
        assert windows == list(range(len(windows)))
        # A generated row reads T's output if and only if T runs in its step.
        for step in steps:
            in_prompt = step.late.start < prompt_len
            assert (step.kind == "prefill") == in_prompt
            assert bool(step.window) == (in_prompt or bool(thought[step.late.start]))
            assert step.wants_logits == (step.late.stop >= prompt_len)


# (kind, T's window, position of D's row, gates (hidden, thought)), by hand: cycle length 4, a prompt of 6.
BY_HAND = {
    ("prompt", "thinking"): [
        ("full", [6], 6, (1, 1)),
        ("late", [], 7, (1, 0)),
        ("late", [], 8, (1, 0)),
        ("late", [], 9, (1, 0)),
        ("full", [7, 8, 9, 10], 10, (1, 1)),
        ("late", [], 11, (1, 0)),
        ("late", [], 12, (1, 0)),
        ("late", [], 13, (1, 0)),
        ("full", [11, 12, 13, 14], 14, (1, 1)),
    ],
    ("absolute", "cyclical"): [
        ("late", [], 6, (1, 0)),
        ("late", [], 7, (1, 0)),
        ("full", [6, 7, 8], 8, (1, 1)),
        ("late", [], 9, (1, 0)),
        ("late", [], 10, (1, 0)),
        ("late", [], 11, (1, 0)),
        ("full", [9, 10, 11, 12], 12, (1, 1)),
    ],
}
BY_HAND["prompt", "sum"] = BY_HAND["prompt", "thinking"]
PROMPT_GATES = {
    ("prompt", "thinking"): [(0, 1)] * 6,
    ("prompt", "sum"): [(1, 1)] * 6,
    ("absolute", "cyclical"): [(1, 1), (1, 0), (1, 0), (1, 0), (1, 1), (1, 0)],
}


@pytest.mark.parametrize("convention", CONVENTIONS, ids="+".join)
def test_cycle_length_4_and_a_prompt_of_6_by_hand(convention: tuple[str, str]) -> None:
    table = BY_HAND[convention]
    prefill, *generated = steps_of(plan_of(4, convention), 6, 6 + len(table))
    assert (prefill.kind, prefill.window, prefill.late) == ("prefill", range(6), range(6))
    assert list(zip(prefill.gate_hidden, prefill.gate_thought, strict=True)) == PROMPT_GATES[convention]
    shown = [
        (step.kind, list(step.window), step.late.start, (step.gate_hidden[0], step.gate_thought[0]))
        for step in generated
    ]
    assert shown == table
    assert all(len(step.late) == 1 for step in generated)


def test_plain_mode_by_hand() -> None:
    prefill, *generated = steps_of(plan_of(4, ("prompt", "sum"), plain=True), 6, 9)
    assert (prefill.gate_hidden, prefill.gate_thought) == ((False,) * 6, (True,) * 6)
    assert [(step.kind, step.window, step.late) for step in generated] == [
        ("full", range(i, i + 1), range(i, i + 1)) for i in (6, 7, 8)
    ]
    assert all((step.gate_hidden, step.gate_thought) == ((False,), (True,)) for step in generated)


def test_cycle_length_1_adds_the_embedding_everywhere() -> None:
    for convention in CONVENTIONS:
        generated = steps_of(plan_of(1, convention), 3, 9)[1:]
        assert all(step.kind == "full" and len(step.window) == 1 for step in generated)
        assert all((step.gate_hidden, step.gate_thought) == ((True,), (True,)) for step in generated)


@pytest.mark.parametrize("convention", [("prompt", "cyclical"), ("absolute", "thinking"), ("absolute", "sum")])
def test_conventions_without_defined_gates_are_refused(convention: tuple[str, str]) -> None:
    with pytest.raises(
        BundleError, match=f"cycle_origin {convention[0]} with prompt_input {convention[1]} is undefined"
    ):
        plan_of(4, convention)


PROMPT_ORIGINS = [convention for convention in CONVENTIONS if convention[0] == "prompt"]


@settings(max_examples=200)
@given(
    tau=st.integers(1, 6),
    convention=st.sampled_from(PROMPT_ORIGINS),
    prompt_len=st.integers(1, 20),
    given_reply=st.integers(0, 9),
    leaving=st.lists(st.sampled_from((None, None, "keep", "take back")), max_size=40),
)
def test_any_heads_with_lawful_gaps_have_the_oracles_gates(
    tau: int, convention: tuple[str, str], prompt_len: int, given_reply: int, leaving: list[str | None]
) -> None:
    """Cycles are left after any step, and late steps taken back: rows are written again from there, and T never twice."""
    plan, at = plan_of(tau, convention), Position(prompt_len=prompt_len, given_len=prompt_len + given_reply)
    gates: list[tuple[bool, bool]] = []
    heads = list(range(prompt_len, prompt_len + given_reply, tau))
    for leave in [None, *leaving]:
        step = plan.next_step(at, 256)
        assert step.late.start == at.fed == len(gates)
        assert not step.window or step.window == range(at.thought, step.late.stop)
        assert len(step.window) <= tau or step.kind == "prefill"
        at.commit(step)
        gates += zip(step.gate_hidden, step.gate_thought, strict=True)
        if step.kind == "full":
            heads.append(step.late.start)
        if leave == "take back" and step.kind == "late":
            at.leave_cycle([step])
            gates.pop()
        elif leave is not None and step.kind != "prefill":
            at.leave_cycle()
        if leave is not None and step.kind != "prefill":
            assert plan.at_head(at)
            assert plan.next_step(at, 1).window == range(at.thought, at.fed + 1)
        assert at.fed - at.thought <= tau - 1
    hidden, thought = oracle.gates(
        spec_of(tau, convention),
        prompt_len=prompt_len,
        total_len=len(gates),
        heads=heads if len(gates) > prompt_len else (),
    )
    assert [(bool(h), bool(t)) for h, t in zip(hidden, thought, strict=True)] == gates
    whole = replace(at)
    while not plan.at_head(whole):
        whole.commit(plan.next_step(whole, 1))
    assert [step.kind for step in plan.cycle_steps(whole)] == ["full"] + ["late"] * (tau - 1)


def test_leaving_cycles_by_hand() -> None:
    """Cycle length 4, a prompt of 6: the late step at 8 is taken back, the one at 10 kept and the cycle left behind it."""
    plan, at = plan_of(4, ("prompt", "thinking")), Position(prompt_len=6)
    shown = []
    for leave in ("", "", "", "take back", "", "", "keep", "", ""):
        step = plan.next_step(at, 256)
        shown.append((step.kind, list(step.window), step.late[-1]))
        at.commit(step)
        if leave:
            at.leave_cycle([step] if leave == "take back" else ())
    assert shown == [
        ("prefill", [0, 1, 2, 3, 4, 5], 5),
        ("full", [6], 6),
        ("late", [], 7),
        ("late", [], 8),
        ("full", [7, 8], 8),
        ("late", [], 9),
        ("late", [], 10),
        ("full", [9, 10, 11], 11),
        ("late", [], 12),
    ]


def test_a_cycle_is_left_with_the_one_that_was_launched_behind_it() -> None:
    plan, at = plan_of(4, ("prompt", "thinking")), Position(prompt_len=6)
    at.commit(plan.next_step(at, 256))
    cycles = []
    for _ in range(3):
        cycles.append(plan.cycle_steps(at))
        for step in cycles[-1]:
            at.commit(step)
    at.leave_cycle([*cycles[1][2:], *cycles[2]])  # heads at 6 and 10, doubt at 12
    assert (at.fed, at.thought) == (12, 11)
    assert [(s.kind, list(s.window), s.late[0]) for s in plan.cycle_steps(at)] == [
        ("full", [11, 12], 12),
        *(("late", [], row) for row in (13, 14, 15)),
    ]


def test_what_may_not_be_left_or_taken_back() -> None:
    assert not plan_of(4, ("absolute", "cyclical")).may_leave
    plan, at = plan_of(4, ("prompt", "sum")), Position(prompt_len=3)
    with pytest.raises(AssertionError, match="in no cycle"):
        at.leave_cycle()
    for _ in range(2):  # the prompt, a head
        at.commit(step := plan.next_step(at, 256))
        with pytest.raises(AssertionError, match="left at a late step"):
            at.leave_cycle([step])


def test_a_step_out_of_order_is_refused() -> None:
    plan, at = plan_of(4, ("prompt", "thinking")), Position(prompt_len=3)
    step = plan.next_step(at, 256)
    at.commit(step)
    with pytest.raises(AssertionError, match="step writes from row 0, 3 rows are committed"):
        at.commit(step)
