"""Sequences that come and go over real bundles: each gets what it gets alone, to the last bit, with prefixes kept or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from runtime_support import CONVENTIONS, MAX_BATCH, RecordingSampler, TinyBundles, random_prompt
from serving_support import PHASES, VOCAB, Guest, Visit, alone, cases, serve

from dmtd_models.reference import oracle
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import Loop
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

CASES, SLOW_CASES = 12, 20_000


def check_case(tiny: TinyBundles, case: dict[str, Any]) -> tuple[int, int]:
    """How many tokens were compared, and how many late steps were dropped."""
    tau, convention, plain = case["plan"]
    backend = tiny.backend(
        case["family"],
        case["encoding_layers"],
        dialect=case["dialect"],
        full_pass=case["full_pass"],
        slots=case["slots"],
    )
    cycle = tiny.get(case["family"], case["encoding_layers"]).cycle(tau, convention)
    plan, compared, dropped = CyclePlan(cycle=cycle, plain=plain), 0, 0
    for guest in serve(backend, plan, case["visits"], case["options"]):
        want = alone(backend, plan, guest.visit, guest.index)
        count = len(guest.tokens)
        assert guest.tokens == want.tokens[:count], f"company changed the tokens of {guest.visit} in {case}"
        if guest.visit.leaves is None:
            assert guest.events[-1].finish_reason == want.events[-1].finish_reason == "length"
            assert count == guest.visit.tokens
            assert guest.steps == want.steps, f"company changed the steps of {guest.visit} in {case}"
        if case["dialect"] == "onnxruntime" and count:
            got, expected = np.stack(guest.sampler.rows), np.stack(want.sampler.rows[:count])
            np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), f"bits of {guest.visit}")
        compared += count
        dropped += guest.sequence.dropped_tokens
    return compared, dropped


@pytest.mark.timeout(600)
def test_company_changes_nothing(tiny: TinyBundles) -> None:
    compared = []

    @settings(max_examples=CASES, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def check(case: dict[str, Any]) -> None:
        compared.append(check_case(tiny, case))

    check()
    assert len(compared) >= CASES
    tokens, dropped = (sum(each) for each in zip(*compared, strict=True))
    assert tokens >= 15 * CASES
    assert dropped >= CASES // 5  # what is drawn decides how many


@pytest.mark.slow
@pytest.mark.timeout(14_400)
def test_company_changes_nothing_in_a_hundred_thousand_sequences(tiny: TinyBundles) -> None:
    sequences = []

    @settings(max_examples=SLOW_CASES, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def check(case: dict[str, Any]) -> None:
        check_case(tiny, case)
        sequences.append(sum(visit.n for visit in case["visits"]))

    check()
    print(f"{sum(sequences)} sequences")


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_where_they_differ(tiny: TinyBundles) -> None:
    backend, plan = tiny.backend(slots=3), CyclePlan(cycle=tiny.get().cycle(4, ("prompt", "thinking")))
    first, second, salted = (
        Visit(at=at, shared=64, own=9, tokens=3, temperature=0, seed=at, priority=0, salt=salt)
        for at, salt in ((0, None), (20, None), (40, "other"))
    )
    loop_options = ServingOptions(prefix_cache_bytes=1 << 28)
    guests = serve(backend, plan, [first, second, salted], loop_options)
    assert [guest.sequence.cached_tokens for guest in guests] == [0, 64, 0]


@pytest.mark.parametrize("kept", [0, 1 << 28])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_prompt_of_several_sequences_is_read_once(tiny: TinyBundles, slots: int, kept: int) -> None:
    """Whoever comes while another one of the same prompt has a slot takes its rows over, kept prefixes or not."""
    backend, plan = tiny.backend(slots=slots), CyclePlan(cycle=tiny.get().cycle(4, ("prompt", "thinking")))
    visit = Visit(at=0, shared=64, own=9, tokens=6, temperature=1.5, seed=1, priority=0, salt=None, n=5)
    guests = serve(backend, plan, [visit], ServingOptions(prefix_cache_bytes=kept, max_num_partial_prefills=3))
    read = [len(guest.visit.prompt) - guest.sequence.cached_tokens for guest in guests]
    again = 9 if kept else 73  # where the one before has gone already: of its rows whole blocks are kept
    assert read == ([73, again, again, again, again] if slots == 1 else [73, 1, 1, 1, 1])
    assert len({tuple(guest.tokens) for guest in guests}) > 1
    for guest in guests:
        want = alone(backend, plan, visit, guest.index)
        np.testing.assert_array_equal(np.stack(guest.sampler.rows), np.stack(want.sampler.rows))


def test_a_full_hit_still_computes_the_last_token(tiny: TinyBundles) -> None:
    backend, plan = tiny.backend(slots=1), CyclePlan(cycle=tiny.get().cycle(4, ("prompt", "thinking")))
    visit = Visit(at=0, shared=63, own=1, tokens=3, temperature=0, seed=1, priority=0, salt=None)
    again = Visit(at=20, shared=63, own=1, tokens=3, temperature=0, seed=1, priority=0, salt=None)
    guests = serve(backend, plan, [visit, again], ServingOptions())
    assert [guest.sequence.cached_tokens for guest in guests] == [0, 48]
    assert guests[0].tokens == guests[1].tokens


@pytest.mark.parametrize(("convention", "cached"), [(("prompt", "thinking"), 32), (("absolute", "cyclical"), 48)])
def test_a_reply_is_reused_only_where_its_gates_stay_the_same(
    tiny: TinyBundles, convention: tuple[str, str], cached: int
) -> None:
    """Turn 2 begins with turn 1's prompt of 40 tokens and its reply of 20: rows of replies last under ``absolute`` alone."""
    backend, plan = tiny.backend(slots=1), CyclePlan(cycle=tiny.get().cycle(4, convention))
    loop = Loop(backend, plan, options=ServingOptions())
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompt, seen = random_prompt(3, 40), []
    for _ in range(2):
        events: list[TokenEvent] = []
        sequence = SequenceRun(
            ids=list(prompt),
            sampler=RecordingSampler(params, vocab_size=VOCAB, prompt_ids=prompt),
            stops=StopRules(params),
            on_event=events.append,
        )
        loop.add(sequence)
        while loop.sequences:
            loop.step()
        seen.append(sequence.cached_tokens)
        prompt = sequence.ids + random_prompt(4, 5)
    assert seen == [0, cached]


@pytest.mark.parametrize(
    ("conversations", "turns"),
    [(12, 240), pytest.param(200, 10_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_nobody_ever_gets_anything_of_another_conversation(tiny: TinyBundles, conversations: int, turns: int) -> None:
    """Every conversation has a secret behind the common beginning; each answer is that of a worker that knows nothing else."""
    backend, plan = tiny.backend(slots=MAX_BATCH), CyclePlan(cycle=tiny.get().cycle(4, ("prompt", "thinking")))
    row_bytes = backend.read_rows(0, range(1))[0].nbytes
    # Far less than all conversations need: much of what is kept goes again.
    loop = Loop(backend, plan, options=ServingOptions(prefix_cache_bytes=60 * conversations * row_bytes))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    common, rng = random_prompt(1, 48), np.random.default_rng(5)
    histories = [common + random_prompt(100 + i, 7) for i in range(conversations)]
    hits, asked = 0, 0
    while asked < turns:
        group = rng.choice(conversations, MAX_BATCH - 2, replace=False).tolist()
        running = []
        for number in group:
            if len(histories[number]) > 180:
                histories[number] = common + random_prompt(100 + number, 7)
            events: list[TokenEvent] = []
            sequence = SequenceRun(
                ids=list(histories[number]),
                sampler=RecordingSampler(params, vocab_size=VOCAB, prompt_ids=histories[number]),
                stops=StopRules(params),
                on_event=events.append,
            )
            loop.add(sequence)
            running.append((number, sequence, events))
            loop.step()
        while loop.sequences:
            loop.step()
        for number, sequence, events in running:
            said = [event.choice.token_id for event in events if event.choice is not None]
            fresh = Guest(Visit(at=0, shared=0, own=1, tokens=4, temperature=0, seed=0, priority=0, salt=None))
            fresh.sequence.ids = list(histories[number])
            alone_loop = Loop(backend, plan)
            alone_loop.add(fresh.sequence)
            while alone_loop.sequences:
                alone_loop.step()
            assert said == fresh.tokens, f"conversation {number} got another answer than alone"
            hits += sequence.cached_tokens > 0
            histories[number] = sequence.ids + random_prompt(asked + number, 6)
        asked += len(group)
    assert hits > asked / 3, "the cache was hardly used"


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("reply_from", [None, 1, 30, 69])
def test_given_tokens_are_scored_as_the_oracle_scores_them(
    tiny: TinyBundles, convention: tuple[str, str], reply_from: int | None
) -> None:
    """As a prompt, or as a reply in cycles from a token on; beside others, in chunks; and what follows goes on from there."""
    bundle, ids = tiny.get("qwen3", 2), random_prompt(11, 70)
    backend = tiny.backend("qwen3", 2, slots=3, max_rows=48)
    loop = Loop(backend, CyclePlan(cycle=bundle.cycle(3, convention)), options=ServingOptions())
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    neighbour = Guest(
        Visit(at=0, shared=0, own=9, tokens=40, temperature=0, seed=1, priority=0, salt=None),
    )
    loop.add(neighbour.sequence)
    for _ in range(3):
        loop.step()
    sampler = RecordingSampler(params, vocab_size=VOCAB, prompt_ids=ids)
    scored = SequenceRun(
        ids=list(ids),
        sampler=sampler,
        stops=StopRules(params),
        on_event=lambda event: None,
        prompt_len=reply_from or 0,
        prompt_logprobs=2,
    )
    loop.add(scored)
    while loop.sequences:
        loop.step()
    reference = bundle.reference(3, convention)
    want = oracle.teacher_forced(reference, scored.ids[:-1], reply_from or len(ids)).log_softmax(-1).numpy()
    assert scored.prompt_choices[0] is None
    choices = [choice for choice in scored.prompt_choices if choice is not None]
    assert [choice.token_id for choice in choices] == ids[1:]
    for row, choice in zip(want, choices, strict=False):
        assert choice.logprob == pytest.approx(row[choice.token_id], abs=1e-4)
        assert [log for _, log in choice.top_logprobs] == pytest.approx(sorted(row, reverse=True)[:2], abs=1e-4)
    got = np.stack(sampler.rows)
    np.testing.assert_allclose(
        got - got.max(-1, keepdims=True), want[69:] - want[69:].max(-1, keepdims=True), atol=1e-3
    )
