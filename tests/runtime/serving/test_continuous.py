"""Sequences that come and go over real bundles: each gets what it gets alone, to the last bit, with prefixes kept or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from device_support import engine_backend, simulator_engines
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from runtime_support import CONVENTIONS, MAX_BATCH, RecordingSampler, TinyBundles, random_prompt

from dmtd_models.reference import oracle
from dmtd_runtime.backends.base import Backend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import Loop
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import FinishReason, SequenceRun, TokenEvent

CASES, ENGINE_CASES, SLOW_CASES = 12, 8, 20_000
VOCAB = 259
PHASES = (Phase.explicit, Phase.generate)  # shrinking a case over models takes longer than reading it


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One sequence: when it comes, what it asks, and when it is cancelled, in steps of the loop."""

    at: int
    shared: int  # tokens that its prompt has in common with others
    own: int
    tokens: int
    temperature: float
    seed: int
    priority: int
    salt: str | None
    leaves: int | None = None

    @property
    def prompt(self) -> list[int]:
        return random_prompt(7, 64)[: self.shared] + random_prompt(self.seed, self.own)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, seed=self.seed, max_tokens=self.tokens, ignore_eos=True)


@dataclass(slots=True)
class Guest:
    """A visit under way, and what it was told."""

    visit: Visit
    sampler: RecordingSampler = field(init=False)
    sequence: SequenceRun = field(init=False)
    events: list[TokenEvent] = field(default_factory=list)
    reason: FinishReason | None = None

    def __post_init__(self) -> None:
        prompt, params = self.visit.prompt, self.visit.params
        self.sampler = RecordingSampler(params, vocab_size=VOCAB, prompt_ids=prompt)
        self.sequence = SequenceRun(
            ids=prompt,
            sampler=self.sampler,
            stops=StopRules(params),
            on_event=self.events.append,
            cancelled=lambda: self.reason,
            priority=self.visit.priority,
            cache_salt=self.visit.salt,
        )

    @property
    def tokens(self) -> list[int]:
        return [event.choice.token_id for event in self.events if event.choice is not None]


def serve(backend: Backend, plan: CyclePlan, visits: Sequence[Visit], options: ServingOptions) -> list[Guest]:
    """Let everybody come at their step, until nobody is left."""
    loop = Loop(backend, plan, options=options)
    guests, step = [Guest(visit) for visit in visits], 0
    while loop.sequences or any(guest.visit.at >= step for guest in guests):
        for guest in guests:
            if guest.visit.at == step:
                loop.add(guest.sequence)
            if guest.visit.leaves is not None and guest.visit.at + guest.visit.leaves == step:
                guest.reason = "abort"
        loop.step()
        step += 1
        assert step < 5_000, "somebody waits for ever"
    counts = loop.counts()
    assert (counts.running, counts.waiting, counts.kv_rows) == (0, 0, 0), "a slot has leaked"
    assert counts.head_passes == counts.head_passes_in_phase
    assert counts.prefix_cache_bytes <= options.prefix_cache_bytes
    return guests


def alone(backend: Backend, plan: CyclePlan, visit: Visit) -> Guest:
    guest = Guest(visit)
    loop = Loop(backend, plan)
    loop.add(guest.sequence)
    while loop.sequences:
        loop.step()
    return guest


visits = st.builds(
    Visit,
    at=st.integers(0, 25),
    shared=st.sampled_from((0, 5, 16, 40, 64)),
    own=st.integers(1, 60),
    tokens=st.integers(1, 20),
    temperature=st.sampled_from((0.0, 0.0, 1.5)),
    seed=st.integers(0, 1 << 20),
    priority=st.integers(0, 1),
    salt=st.sampled_from((None, None, "a")),
    leaves=st.sampled_from((None, None, None, 0, 3, 9)),
)
all_options = st.builds(
    ServingOptions,
    max_num_batched_tokens=st.sampled_from((None, 8, 64)),
    long_prefill_token_threshold=st.sampled_from((None, 1, 16)),
    max_num_partial_prefills=st.integers(1, 3),
    prefix_cache_bytes=st.sampled_from((0, 100_000, 1 << 28)),
)
plans = st.tuples(st.integers(1, 6), st.sampled_from(CONVENTIONS), st.sampled_from((False, False, False, True)))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "family": draw(st.sampled_from(("qwen3", "llama"))),
        "encoding_layers": draw(st.sampled_from((0, 2))),
        "dialect": draw(st.sampled_from(("onnxruntime", "onnxruntime", "standard"))),
        "full_pass": draw(st.sampled_from(("staged", "fused"))),
        "slots": draw(st.sampled_from((1, 3, MAX_BATCH))),
        "plan": draw(plans),
        "options": draw(all_options),
        "visits": draw(st.lists(visits, min_size=1, max_size=12)),
    }


def check_case(tiny: TinyBundles, case: dict[str, Any]) -> int:
    """How many tokens were compared."""
    tau, convention, plain = case["plan"]
    backend = tiny.backend(
        case["family"],
        case["encoding_layers"],
        dialect=case["dialect"],
        full_pass=case["full_pass"],
        slots=case["slots"],
    )
    cycle = tiny.get(case["family"], case["encoding_layers"]).cycle(tau, convention)
    plan, compared = CyclePlan(cycle=cycle, plain=plain), 0
    for guest in serve(backend, plan, case["visits"], case["options"]):
        want = alone(backend, plan, guest.visit)
        count = len(guest.tokens)
        assert guest.tokens == want.tokens[:count], f"company changed the tokens of {guest.visit} in {case}"
        if guest.visit.leaves is None:
            assert guest.events[-1].finish_reason == want.events[-1].finish_reason == "length"
            assert count == guest.visit.tokens
        if case["dialect"] == "onnxruntime" and count:
            got, expected = np.stack(guest.sampler.rows), np.stack(want.sampler.rows[:count])
            np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), f"bits of {guest.visit}")
        compared += count
    return compared


@pytest.mark.timeout(600)
def test_company_changes_nothing(tiny: TinyBundles) -> None:
    compared = []

    @settings(max_examples=CASES, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def check(case: dict[str, Any]) -> None:
        compared.append(check_case(tiny, case))

    check()
    assert len(compared) >= CASES
    assert sum(compared) >= 15 * CASES


@pytest.mark.slow
@pytest.mark.timeout(14_400)
def test_company_changes_nothing_in_a_hundred_thousand_sequences(tiny: TinyBundles) -> None:
    sequences = []

    @settings(max_examples=SLOW_CASES, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def check(case: dict[str, Any]) -> None:
        check_case(tiny, case)
        sequences.append(len(case["visits"]))

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


@pytest.mark.timeout(600)
def test_on_engines_too(tiny: TinyBundles) -> None:
    """The simulator runs whole cycles: newcomers are let in between two, and the tokens are those of each alone."""
    bundle = tiny.get()
    engines = {fused: simulator_engines(bundle.directory, fused=fused) for fused in (False, True)}
    compared, cycles = 0, 0

    @settings(max_examples=ENGINE_CASES, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def check(case: dict[str, Any]) -> None:
        nonlocal compared, cycles
        tau, convention, plain = case["plan"]
        tau = min(tau, 4)  # the engines' windows hold as many rows
        cycle, fused = bundle.cycle(tau, convention), case["full_pass"] == "fused"
        backend = engine_backend(
            bundle.directory, bundle.manifest, engines[fused], cycle=cycle, slots=case["slots"], fused=fused
        )
        plan = CyclePlan(cycle=cycle, plain=plain)
        try:
            for guest in serve(backend, plan, case["visits"], case["options"]):
                want = alone(backend, plan, guest.visit)
                assert guest.tokens == want.tokens[: len(guest.tokens)], f"{guest.visit} in {case}"
                assert guest.visit.leaves is not None or len(guest.tokens) == guest.visit.tokens
                compared += len(guest.tokens)
            cycles += backend.stats.cycles
        finally:
            backend.close()

    check()
    assert compared > 10 * ENGINE_CASES
    assert cycles > 5 * ENGINE_CASES


@pytest.mark.parametrize(
    ("conversations", "turns"),
    [(12, 240), pytest.param(200, 10_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_nobody_ever_gets_anything_of_another_conversation(tiny: TinyBundles, conversations: int, turns: int) -> None:
    """Every conversation has a secret behind the common beginning; each answer is that of a worker that knows nothing else."""
    backend, plan = tiny.backend(slots=MAX_BATCH), CyclePlan(cycle=tiny.get().cycle(4, ("prompt", "thinking")))
    row_bytes = backend.read_rows(0, range(1)).nbytes
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
