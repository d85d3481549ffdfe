"""Sequences that come and go over real bundles: each gets what it gets alone, to the last bit, with prefixes kept or not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from runtime_support import CONVENTIONS, MAX_BATCH, Array, RecordingSampler, TinyBundles, random_prompt
from serving_support import VOCAB, Guest, Visit, alone, serve
from serving_sweep import Tally, is_tie, make_small_bundle, play, worlds

from dmtd_models.reference import oracle
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import Loop
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

# Worlds, and schedules in each.
PLAYED = pytest.param(12, 12)
PLAYED_SLOWLY = pytest.param(1_000, 80, marks=[pytest.mark.slow, pytest.mark.timeout(14_400)])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyBundles]:
    bundles = TinyBundles(tmp_path_factory.mktemp("small"), make_small_bundle)
    yield bundles
    bundles.close()


@pytest.mark.parametrize(("num_worlds", "schedules"), [PLAYED, PLAYED_SLOWLY])
def test_company_changes_nothing(small: TinyBundles, num_worlds: int, schedules: int) -> None:
    tally = Tally()
    for world in worlds(num_worlds):
        cycle = small.get(world.family, world.encoding_layers).cycle(world.tau, world.convention)
        backend = small.backend(
            world.family,
            world.encoding_layers,
            dialect=world.dialect,
            full_pass=world.full_pass,
            slots=world.slots,
        )
        tally += play(world, backend, CyclePlan(cycle=cycle, plain=world.plain), schedules)
    print(tally)
    count = num_worlds * schedules
    assert tally.schedules == count
    assert tally.ties <= 1 + count // 1_000
    # What is drawn decides how many.
    assert tally.sequences > 5 * count
    assert tally.tokens > 25 * count
    assert tally.dropped > count // 5
    assert tally.ended > count


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_tie_is_told_from_another_choice(temperature: float) -> None:
    """A token is raised until another choice is made: just before, the two are tied; far before, they are not."""
    visit = Visit(at=0, shared=0, own=5, tokens=3, temperature=temperature, seed=3, priority=0, salt=None)
    row = np.linspace(0, 3, VOCAB, dtype=np.float32)

    def raised(by: float) -> Array:
        return np.where(np.arange(VOCAB) == 9, row + np.float32(by), row)

    def choice(by: float) -> int:
        return Guest(visit).sampler.choose(raised(by)).token_id

    low, high = 0.0, 20.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if choice(middle) == choice(0) else (low, middle)
    assert choice(high) != choice(low)
    assert is_tie(Guest(visit), [], raised(low), choice(high))
    assert not is_tie(Guest(visit), [], raised(low - 0.01), choice(high))


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
