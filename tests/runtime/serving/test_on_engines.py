"""Sequences that come and go over engines, on the simulator: whole cycles beside prompts and beside who needs the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from device_support import Engines, engine_backend, simulator_engines
from hypothesis import HealthCheck, given, settings
from runtime_support import MARGIN, TinyBundle, TinyBundles
from serving_support import PHASES, Visit, alone, cases, serve

from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.serving.options import ServingOptions

CASES, SLOW_CASES = 8, 2_000


def check_engine_case(bundle: TinyBundle, engines: dict[bool, Engines], case: dict[str, Any]) -> tuple[int, int]:
    """How many tokens were compared, and how many cycles ran whole."""
    tau, convention, plain = case["plan"]
    tau = min(tau, 4)  # the engines' windows hold as many rows
    cycle, fused = bundle.cycle(tau, convention), case["full_pass"] == "fused"
    backend = engine_backend(
        bundle.directory, bundle.manifest, engines[fused], cycle=cycle, slots=case["slots"], fused=fused
    )
    plan, compared = CyclePlan(cycle=cycle, plain=plain), 0
    try:
        for guest in serve(backend, plan, case["visits"], case["options"]):
            want, count = alone(backend, plan, guest.visit, guest.index), len(guest.tokens)
            assert guest.tokens == want.tokens[:count], f"{guest.visit} in {case}"
            assert guest.visit.leaves is not None or (count, guest.steps) == (guest.visit.tokens, want.steps)
            if guest.visit.logprobs is not None and count:
                got, expected = np.stack(guest.sampler.rows), np.stack(want.sampler.rows[:count])
                # Another batch, another order of sums; the tokens are the same.
                np.testing.assert_allclose(got, expected, rtol=0, atol=MARGIN * np.abs(expected).max())
            compared += count
        return compared, backend.stats.cycles
    finally:
        backend.close()


@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("count", [CASES, pytest.param(SLOW_CASES, marks=pytest.mark.slow)])
def test_on_engines_too(tiny: TinyBundles, count: int) -> None:
    """The simulator runs whole cycles: newcomers are let in between two, and the tokens are those of each alone."""
    bundle = tiny.get()
    engines = {fused: simulator_engines(bundle.directory, fused=fused) for fused in (False, True)}
    sequences, compared, cycles = 0, 0, 0

    @settings(max_examples=count, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def check(case: dict[str, Any]) -> None:
        nonlocal sequences, compared, cycles
        tokens, ran = check_engine_case(bundle, engines, case)
        sequences, compared, cycles = sequences + sum(v.n for v in case["visits"]), compared + tokens, cycles + ran

    check()
    print(f"{sequences} sequences, {compared} tokens, {cycles} cycles")
    assert compared > 10 * count
    assert cycles > 5 * count


def test_a_long_prompt_is_read_between_the_cycles_of_another(tiny: TinyBundles) -> None:
    """Whoever stands between two cycles lags behind in T's caches: padding of a prompt's pass leaves no gap there."""
    bundle = tiny.get()
    cycle = bundle.cycle(4, ("prompt", "thinking"))
    backend = engine_backend(
        bundle.directory, bundle.manifest, simulator_engines(bundle.directory), cycle=cycle, slots=2
    )
    try:
        visits = [
            Visit(at=0, shared=0, own=own, tokens=tokens, temperature=0, seed=own, priority=0, salt=None)
            for own, tokens in ((9, 33), (230, 9))
        ]
        plan = CyclePlan(cycle=cycle)
        guests, stats = serve(backend, plan, visits, ServingOptions(max_num_partial_prefills=1)), replace(backend.stats)
        assert stats.prefill_passes == 1 + 5, "64 rows of the second prompt, 3 times 48 and 22"
        for guest in guests:
            assert guest.tokens == alone(backend, plan, guest.visit).tokens
    finally:
        backend.close()


@pytest.mark.parametrize("plain", [False, True])
def test_who_needs_the_host_does_not_keep_the_others_from_their_cycles(tiny: TinyBundles, plain: bool) -> None:
    """One of three wants log probabilities: the others' cycles run whole, and T is read twice a cycle, not once a step."""
    bundle, tau, tokens = tiny.get(), 4, 13  # the prompt's, and three cycles
    cycle = bundle.cycle(tau, ("prompt", "thinking"))
    engines = simulator_engines(bundle.directory, fused=False)
    backend = engine_backend(bundle.directory, bundle.manifest, engines, cycle=cycle, slots=3, fused=False)
    try:
        visits = [
            Visit(at=0, shared=0, own=9, tokens=tokens, temperature=t, seed=n, priority=0, salt=None, logprobs=logprobs)
            for n, (t, logprobs) in enumerate(((0.0, None), (0.0, 2), (1.5, None)))
        ]
        plan, options = CyclePlan(cycle=cycle, plain=plain), ServingOptions(max_num_partial_prefills=3)
        guests, stats = serve(backend, plan, visits, options), replace(backend.stats)
        assert stats.cycles == 3
        assert stats.full_passes - stats.prefill_passes == 2 * 3 * (tau if plain else 1)
        for guest in guests:
            want = alone(backend, plan, guest.visit)
            assert [event.choice for event in guest.events] == [event.choice for event in want.events]
    finally:
        backend.close()
