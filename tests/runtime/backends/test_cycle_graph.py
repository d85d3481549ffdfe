"""The cycle graph, whose steps choose the tokens that they feed: the oracle's tokens, whoever ends, fails or samples beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from runtime_support import MAX_BATCH, TinyBundles, random_prompt, sequence_of, tokens_of, without_cycle

from dmtd_models.reference import oracle
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.backends.onnxruntime.limits import runs_in_one_go
from dmtd_runtime.bundle.speed_bound import split_bytes
from dmtd_runtime.cycle import CyclePlan, Position
from dmtd_runtime.errors import BackendError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.serving.loop import Loop, run_batch
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

GREEDY = SamplingParams(temperature=0, max_tokens=19)


@pytest.fixture
def cycles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each cycle had that a backend was asked for."""
    found: list[int] = []
    start = OnnxRuntimeBackend.start_cycle

    def noted(self: OnnxRuntimeBackend, slots: Any, committed: Any, **options: Any) -> None:
        found.append(len(slots[0].steps))
        start(self, slots, committed, **options)

    monkeypatch.setattr(OnnxRuntimeBackend, "start_cycle", noted)
    return found


@pytest.mark.parametrize(
    ("layers", "convention", "tau", "slots", "plain"),
    [
        (0, ("prompt", "thinking"), 4, 1, False),
        (0, ("prompt", "thinking"), 4, MAX_BATCH, False),
        (0, ("prompt", "sum"), 7, 2, False),  # longer than the graph has steps
        (2, ("prompt", "thinking"), 4, 1, False),
        (2, ("prompt", "sum"), 3, 3, False),
        (2, ("absolute", "cyclical"), 3, 1, False),
        (0, ("absolute", "cyclical"), 2, 2, False),
        (0, ("prompt", "thinking"), 4, 1, True),  # plainly: as many passes, one behind another
        (2, ("prompt", "thinking"), 4, 3, True),
    ],
)
def test_tokens_are_the_oracles(
    tiny: TinyBundles,
    cycles: list[int],
    layers: int,
    convention: tuple[str, str],
    tau: int,
    slots: int,
    plain: bool,
) -> None:
    bundle, backend = tiny.get("qwen3", layers), tiny.backend("qwen3", layers, full_pass=None, slots=slots)
    reference, plan = bundle.reference(tau, convention), CyclePlan(cycle=bundle.cycle(tau, convention), plain=plain)
    # Where heads stand by the count from a sequence's start, they fall together at equal lengths alone.
    lengths = [6 if convention[0] == "absolute" else 5 + seed % 3 for seed in range(slots)]
    prompts = [random_prompt(seed, length) for seed, length in enumerate(lengths)]
    for prompt, tokens in zip(prompts, tokens_of(backend, plan, prompts, [GREEDY] * slots), strict=True):
        assert tuple(tokens) == oracle.greedy(reference, prompt, 19, plain).token_ids
    assert len(cycles) >= 19 // tau - 1 and set(cycles) == {tau}


def test_who_ends_within_a_cycle_leaves_the_others_as_they_are(tiny: TinyBundles, cycles: list[int]) -> None:
    bundle, backend = tiny.get(), tiny.backend(full_pass=None, slots=3)
    prompts, plan = [random_prompt(seed, 6) for seed in range(3)], CyclePlan(cycle=bundle.manifest.cycle)
    want = [bundle.greedy_tokens(prompt, 19) for prompt in prompts]
    for end in range(2, 10):  # at every place of a cycle
        stop = want[1][end]
        first = want[1].index(stop)
        params = [GREEDY, SamplingParams(temperature=0, max_tokens=19, stop_token_ids=(stop,)), GREEDY]
        got = tokens_of(backend, plan, prompts, params)
        assert got == [want[0], want[1][: first + 1], want[2]]
    assert cycles


def test_who_is_cancelled_within_a_cycle_leaves_when_it_is_over(tiny: TinyBundles, cycles: list[int]) -> None:
    bundle, backend = tiny.get(), tiny.backend(full_pass=None, slots=3)
    prompts, tau = [random_prompt(seed, 6) for seed in range(3)], bundle.manifest.cycle.cycle_length
    want = [bundle.greedy_tokens(prompt, 19) for prompt in prompts]
    for end in range(2, 10):
        told: list[list[TokenEvent]] = [[], [], []]
        made = zip(prompts, told, strict=True)
        sequences = [sequence_of(prompt, GREEDY, own) for prompt, own in made]
        gone = sequences[1]
        gone.cancelled = lambda gone=gone, end=end: "abort" if len(gone.ids) >= 6 + end else None  # type: ignore[misc]
        run_batch(backend, CyclePlan(cycle=bundle.manifest.cycle), sequences)
        assert [own[-1].finish_reason for own in told] == ["length", "abort", "length"]
        tokens = [sequence.ids[6:] for sequence in sequences]
        assert (tokens[0], tokens[2]) == (want[0], want[2])
        assert tokens[1] == want[1][: len(tokens[1])] and end <= len(tokens[1]) < end + tau
    assert cycles


@pytest.mark.parametrize(
    "other",
    [
        SamplingParams(temperature=0.9, seed=3, max_tokens=19),
        SamplingParams(temperature=0, logprobs=2, max_tokens=19),
        SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=19),
        SamplingParams(temperature=0, min_tokens=19, stop_token_ids=(1,), max_tokens=19),
    ],
    ids=["sampled", "logprobs", "penalty", "min_tokens"],
)
def test_beside_who_needs_logits_all_go_step_by_step(
    tiny: TinyBundles, cycles: list[int], other: SamplingParams
) -> None:
    bundle, backend = tiny.get(), tiny.backend(full_pass=None, slots=2)
    prompts, plan = [random_prompt(seed, 6) for seed in range(2)], CyclePlan(cycle=bundle.manifest.cycle)
    alone = tokens_of(tiny.backend(slots=2), plan, prompts, [GREEDY, other])
    assert tokens_of(backend, plan, prompts, [GREEDY, other]) == alone
    assert alone[0] == bundle.greedy_tokens(prompts[0], 19)
    assert not cycles


def test_prompts_go_with_heads_and_cycles_go_on_behind_them(tiny: TinyBundles, cycles: list[int]) -> None:
    bundle, backend = tiny.get(), tiny.backend(full_pass=None, slots=2)
    told, plan = list[TokenEvent](), CyclePlan(cycle=bundle.manifest.cycle)
    loop, prompts = Loop(backend, plan), [random_prompt(1, 6), random_prompt(2, 40)]
    sequences = [sequence_of(prompt, SamplingParams(temperature=0, max_tokens=30), told) for prompt in prompts]
    loop.add(sequences[0])
    while len(sequences[0].ids) < 6 + 9:
        loop.step()
    before = len(cycles)
    loop.add(sequences[1])
    while loop.sequences:
        loop.step()
    assert 0 < before < len(cycles)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.ids[len(prompt) :] == bundle.greedy_tokens(prompt, 30)


@pytest.mark.parametrize("layers", [0, 2])
def test_neither_company_nor_whole_cycles_change_a_bit(tiny: TinyBundles, cycles: list[int], layers: int) -> None:
    """What stands in the caches behind a reply: alone and in whole cycles, step by step, or beside prompts that come."""
    bundle, told = tiny.get("qwen3", layers), list[TokenEvent]()
    backend, plan = tiny.backend("qwen3", layers, full_pass=None, slots=3), CyclePlan(cycle=bundle.manifest.cycle)
    prompt, params = random_prompt(1, 6), SamplingParams(temperature=0, max_tokens=30)

    def caches(*, by_steps: bool = False, company: Sequence[int] = ()) -> bytes:
        """Those of the sequence that is there from the beginning; others come when it has so many tokens."""
        kept: list[bytes] = []

        def leaving(sequence: SequenceRun, slot: int, at: Position) -> None:
            if sequence is first:
                kept.append(np.stack(backend.read_rows(slot, range(0, 30, 30))).tobytes())

        loop, coming = Loop(backend, plan, leaving=leaving), list(company)
        first = sequence_of(prompt, replace(params, logprobs=0) if by_steps else params, told)
        loop.add(first)
        while loop.sequences:
            if coming and len(first.ids) >= 6 + coming[0]:
                loop.add(sequence_of(random_prompt(coming.pop(0), 40), params, told))
            loop.step()
        [found] = kept
        return found

    alone = caches()
    assert cycles
    assert caches(by_steps=True) == alone
    assert caches(company=[3, 12]) == alone
    assert caches(by_steps=True, company=[5]) == alone


def test_nan_within_a_cycle_fails_its_own_sequence(tiny: TinyBundles, cycles: list[int]) -> None:
    bundle = tiny.get()
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, BackendOptions(max_num_seqs=3, threads=1))
    plan, prompts = CyclePlan(cycle=bundle.manifest.cycle), [random_prompt(seed, 6) for seed in range(3)]
    want = [bundle.greedy_tokens(prompt, 19) for prompt in prompts]
    loop, told = Loop(backend, plan), [list[TokenEvent]() for _ in prompts]
    sequences = [sequence_of(prompt, GREEDY, own) for prompt, own in zip(prompts, told, strict=True)]
    for sequence in sequences:
        loop.add(sequence)
    while not cycles:
        loop.step()
    [rows] = backend.read_rows(1, range(0, 4, 4))
    backend.write_rows(1, 0, np.full_like(rows, np.nan))  # as a faulty weight leaves them
    while loop.sequences:
        loop.step()
    assert isinstance(told[1][-1].error, BackendError) and "NaN" in str(told[1][-1].error)
    assert [sequences[i].ids[6:] for i in (0, 2)] == [want[0], want[2]]
    assert tokens_of(backend, plan, prompts, [GREEDY] * 3) == want
    backend.close()


def test_one_session_holds_all_and_an_older_bundle_runs_without(tiny: TinyBundles) -> None:
    bundle = tiny.get()
    options = BackendOptions(threads=1)
    for manifest, sessions in (
        (bundle.manifest, ["cycle"]),
        (without_cycle(bundle.manifest), ["thinking", "late_decode"]),
    ):
        backend = OnnxRuntimeBackend(bundle.directory, manifest, options)
        assert list(backend._sessions) == sessions and backend.runs_cycles == (len(sessions) == 1)
        prompt = random_prompt(0, 6)
        assert tokens_of(backend, CyclePlan(cycle=manifest.cycle), [prompt], [GREEDY]) == [
            bundle.greedy_tokens(prompt, 19)
        ]
        backend.close()


def test_a_table_that_is_looked_up_is_no_part_of_a_late_step(
    tiny: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tiny.get("llama").manifest
    read = split_bytes(manifest)
    assert not read.tied
    for spare, expected in ((0, True), (-1, False)):
        limit = read.encoding + read.decoding + read.lm_head + spare
        monkeypatch.setattr("dmtd_runtime.backends.onnxruntime.limits.MAX_STEP_BYTES", limit)
        assert runs_in_one_go(manifest) is expected


def test_long_late_steps_come_one_by_one(tiny: TinyBundles, cycles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmtd_runtime.backends.onnxruntime.limits.MAX_STEP_BYTES", 1000)
    bundle, prompt = tiny.get(), random_prompt(0, 6)
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, BackendOptions(threads=1))
    got = tokens_of(backend, CyclePlan(cycle=bundle.manifest.cycle), [prompt], [GREEDY])
    assert got == [bundle.greedy_tokens(prompt, 19)] and not cycles and list(backend._sessions) == ["cycle"]
    backend.close()
