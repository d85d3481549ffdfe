"""Sequences that come and go over engines, on the simulator: whole cycles beside prompts and beside who needs the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
from device_support import engine_backend, simulator_engines
from runtime_support import TinyBundles
from serving_support import Visit, alone, serve
from serving_sweep import Tally, make_small_bundle, play, worlds

from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.serving.options import ServingOptions

# Their windows hold as many rows as the longest cycle.
OF_THE_ENGINES = {"family": ("qwen3",), "encoding_layers": (0,), "dialect": ("standard",), "tau": (1, 2, 3, 4)}
# Worlds, and schedules in each.
PLAYED = pytest.param(8, 5)
PLAYED_SLOWLY = pytest.param(250, 80, marks=[pytest.mark.slow, pytest.mark.timeout(14_400)])


@pytest.mark.parametrize(("num_worlds", "schedules"), [PLAYED, PLAYED_SLOWLY])
def test_company_changes_nothing_on_engines(
    tmp_path_factory: pytest.TempPathFactory, num_worlds: int, schedules: int
) -> None:
    """The simulator runs whole cycles: newcomers are let in between two, and the tokens are those of each alone."""
    bundle = make_small_bundle(tmp_path_factory.mktemp("small"), "qwen3", 0)
    engines = {fused: simulator_engines(bundle.directory, fused=fused) for fused in (False, True)}
    tally, cycles = Tally(), 0
    for world in worlds(num_worlds, OF_THE_ENGINES):
        cycle, fused = bundle.cycle(world.tau, world.convention), world.full_pass == "fused"
        backend = engine_backend(
            bundle.directory, bundle.manifest, engines[fused], cycle=cycle, slots=world.slots, fused=fused
        )
        try:
            tally += play(world, backend, CyclePlan(cycle=cycle, plain=world.plain), schedules)
            cycles += backend.stats.cycles
        finally:
            backend.close()
    print(f"{tally}, {cycles} cycles")
    count = num_worlds * schedules
    assert tally.schedules == count
    assert tally.ties <= 1 + count // 1_000
    assert tally.sequences > 5 * count
    assert tally.tokens > 25 * count
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
