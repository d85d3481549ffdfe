"""The token choice, against a slow float64 reference, hand-computed numbers, published vectors and chi-square."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmtd_runtime.errors import DmtdError, RequestError
from dmtd_runtime.sampling import sampler as sampler_module
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import MAX_CANDIDATES, NOT_FINITE, Sampler, best_tokens, top_ids, uniform


def reference_choice(
    logits: np.ndarray, params: SamplingParams, *, prompt: list[int], output: list[int], u: float, ends: list[int]
) -> tuple[int, float]:
    """The eight rules in plain Python floats; also the distance of ``u`` from the nearest edge between two tokens."""
    z = [float(v) for v in logits]
    for token_id, bias in (params.logit_bias or {}).items():
        z[token_id] += bias
    if len(output) < params.min_tokens:
        for token_id in ends:
            z[token_id] = -math.inf
    for token_id in range(len(z)):
        if token_id in prompt or token_id in output:
            r = params.repetition_penalty
            z[token_id] = z[token_id] / r if z[token_id] > 0 else z[token_id] * r
        times = output.count(token_id)
        z[token_id] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    if params.temperature == 0:
        return order[0], 1.0
    order = order[:1024]
    if params.top_k > 0:
        order = order[: params.top_k]
    order = [i for i in order if math.exp((z[i] - z[order[0]]) / params.temperature) >= params.min_p]
    weights = [math.exp((z[i] - z[order[0]]) / params.temperature) for i in order]
    kept, before = [], 0.0
    for token_id, weight in zip(order, weights, strict=True):
        if kept and not before < params.top_p * math.fsum(weights) and params.top_p < 1:
            break
        kept.append((token_id, weight))
        before += weight
    total = math.fsum(weight for _, weight in kept)
    edges = [math.fsum(weight for _, weight in kept[: i + 1]) / total for i in range(len(kept))]
    index = next(i for i, edge in enumerate(edges) if u < edge or i == len(edges) - 1)
    return kept[index][0], min(abs(u - edge) for edge in edges)


def make(params: SamplingParams, vocab_size: int, **options: Any) -> Sampler:
    return Sampler(params, **{"vocab_size": vocab_size, "prompt_ids": [], "seed": 0, **options})


def row(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


# -- greedy and ties


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    sampler = make(SamplingParams(temperature=0), 5)
    assert sampler.choose(row(1, 3, 2, 3, 3)).token_id == 1
    assert sampler.num_chosen == 1


def test_top_ids_orders_ties_by_id_also_at_the_edge() -> None:
    logits = row(2, 5, 2, 7, 2, 5, 2)
    assert top_ids(logits, 1).tolist() == [3]
    assert top_ids(logits, 4).tolist() == [3, 1, 5, 0]
    assert top_ids(logits, 5).tolist() == [3, 1, 5, 0, 2]
    assert top_ids(logits, 7).tolist() == [3, 1, 5, 0, 2, 4, 6]
    assert top_ids(logits, 99).tolist() == [3, 1, 5, 0, 2, 4, 6]


def test_top_ids_equals_a_stable_sort() -> None:
    logits = np.random.default_rng(3).integers(-4, 5, 4000).astype(np.float32)
    order = sorted(range(4000), key=lambda i: (-logits[i], i))
    for count in (1, 17, 1024, 3999, 4000):
        assert top_ids(logits, count).tolist() == order[:count]


# -- penalties, bias and masks by hand


def test_repetition_penalty_by_hand() -> None:
    # Token 0 is in the prompt, token 2 in the output: 4 / 2 = 2, -1 * 2 = -2; token 1 (1.5) stays behind 0, before 2.
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    sampler = make(params, 4, prompt_ids=[0, 0])
    sampler.observe(2)
    assert sampler.choose(row(4, 1.5, -1, -1.5)).token_id == 0
    assert sampler.choose(row(2.9, 1.5, -1, -1.5)).token_id == 1
    # Now 0, 1 and 2 were seen: -1 * 2 = -2 for token 2 loses to the unseen -1.5.
    assert sampler.choose(row(-3, -3, -1, -1.5)).token_id == 3


def test_presence_and_frequency_count_the_output_only() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = make(params, 3, prompt_ids=[0, 0, 0, 0])
    logits = row(1.0, 0.4, -9)
    # Scores of token 0: 1.0, then 1 - .5 - .25 = .25 < .4; token 1 then .4 - .75 = -.35 < .25; then 0 again: 0.0.
    assert [sampler.choose(logits).token_id for _ in range(4)] == [0, 1, 0, 0]
    # Token 0 has come three times: 1 - .5 - .75 = -.25; token 1 once: -.35.
    assert sampler.choose(logits).token_id == 0
    # Four times: 1 - .5 - 1 = -.5.
    assert sampler.choose(logits).token_id == 1


def test_negative_penalties_favour() -> None:
    sampler = make(SamplingParams(temperature=0, presence_penalty=-1), 2)
    sampler.observe(1)
    assert sampler.choose(row(0.9, 0)).token_id == 1


def test_logit_bias_and_its_order_before_penalties() -> None:
    assert make(SamplingParams(temperature=0, logit_bias={2: 1.5, 0: -100}), 3).choose(row(9, 1, 0)).token_id == 2
    # -1 + 5 = 4, then 4 / 2 = 2 < 3. The other way round it would be -2 + 5 = 3 >= 3.
    sampler = make(SamplingParams(temperature=0, logit_bias={0: 5}, repetition_penalty=2), 2, prompt_ids=[0])
    assert sampler.choose(row(-1, 3)).token_id == 1


def test_min_tokens_masks_end_and_stop_ids() -> None:
    logits = row(5, 4, 3, 2)
    options: dict[str, Any] = {"temperature": 0, "min_tokens": 2, "stop_token_ids": [1]}
    sampler = make(SamplingParams(**options), 4, eos_token_ids=[0, 99])
    assert [sampler.choose(logits).token_id for _ in range(4)] == [2, 2, 0, 0]
    # With ignore_eos the end-of-sequence id is an ordinary token, the stop id is not.
    sampler = make(SamplingParams(**options, ignore_eos=True), 4, eos_token_ids=[0])
    assert sampler.choose(logits).token_id == 0
    assert sampler.choose(row(3, 4, 2, 1)).token_id == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_choose(temperature: float) -> None:
    sampler = make(SamplingParams(temperature=temperature, min_tokens=1), 2, eos_token_ids=[0, 1])
    with pytest.raises(RequestError, match="nothing to choose from"):
        sampler.choose(row(1, 2))


def test_masked_tokens_are_never_drawn() -> None:
    params = SamplingParams(min_tokens=300, temperature=100.0)
    sampler = make(params, 4, eos_token_ids=[0, 2])
    assert {sampler.choose(row(9, 0, 9, 0)).token_id for _ in range(300)} == {1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, place: int, temperature: float) -> None:
    logits = row(1, 2, 3, 4)
    logits[place] = bad
    with pytest.raises(DmtdError, match="got NaN or infinity for token 0 of sequence 0") as caught:
        make(SamplingParams(temperature=temperature), 4).choose(logits)
    assert "\n" not in str(caught.value)


def test_the_best_tokens_of_many_rows_are_those_of_each() -> None:
    rows = np.array([[1, 3, 3, 2], [-1, np.nan, 0, 5], [np.inf, 0, 1, 2], [2, 1, -np.inf, 0], [0, 0, 0, 0]], np.float32)
    assert best_tokens(rows).tolist() == [1, NOT_FINITE, NOT_FINITE, NOT_FINITE, 0]


def test_ids_out_of_range_are_refused() -> None:
    with pytest.raises(RequestError, match="logit_bias: got token id 4"):
        make(SamplingParams(logit_bias={4: 1}), 4)
    with pytest.raises(RequestError, match="prompt: got token id 4"):
        make(SamplingParams(repetition_penalty=2), 4, prompt_ids=[1, 4])


def test_wrong_shape_or_type_is_a_bug() -> None:
    with pytest.raises(AssertionError, match=r"\[4\], got \[3\]"):
        make(SamplingParams(), 4).choose(row(1, 2, 3))
    with pytest.raises(AssertionError, match="float32, got float64"):
        make(SamplingParams(), 4).choose(np.zeros(4))  # type: ignore[arg-type]


# -- cuts


def drawn(params: SamplingParams, logits: np.ndarray, count: int = 400) -> set[int]:
    return {make(params, len(logits), seed=seed).choose(logits).token_id for seed in range(count)}


def test_cuts_by_hand() -> None:
    # Probabilities .5, .25, .125, .125.
    logits = np.log(row(0.25, 0.5, 0.125, 0.125))
    assert drawn(SamplingParams(), logits) == {0, 1, 2, 3}
    assert drawn(SamplingParams(top_k=2), logits) == {0, 1}
    assert drawn(SamplingParams(top_k=3), logits) == {0, 1, 2}
    assert drawn(SamplingParams(top_p=0.49), logits) == {1}
    assert drawn(SamplingParams(top_p=0.51), logits) == {0, 1}
    assert drawn(SamplingParams(top_p=0.8), logits) == {0, 1, 2}
    assert drawn(SamplingParams(min_p=0.4), logits) == {0, 1}
    assert drawn(SamplingParams(min_p=0.2), logits) == {0, 1, 2, 3}
    # Of the top two, .667 and .333 after scaling: top_p .6 keeps one; unscaled it would keep both.
    assert drawn(SamplingParams(top_k=2, top_p=0.6), logits) == {1}
    # The same behind min_p.
    assert drawn(SamplingParams(min_p=0.4, top_p=0.6), logits) == {1}
    # Temperature comes first: at .5 the probabilities go as squares, .727, .182, .045, .045.
    assert drawn(SamplingParams(temperature=0.5, top_p=0.7), logits) == {1}


def test_cuts_at_their_edges() -> None:
    equal = row(2, 2, 1, 2)
    assert drawn(SamplingParams(min_p=1), equal) == {0, 1, 3}
    assert drawn(SamplingParams(top_k=2), equal) == {0, 1}
    # Of four equal tokens, two reach .5 exactly.
    assert drawn(SamplingParams(top_p=0.5), row(2, 2, 2, 2)) == {0, 1}


@pytest.mark.parametrize(("u", "token_id"), [(0.0, 1), (0.2499, 1), (0.25, 2), (0.5, 3), (0.75, 4), (1 - 2**-53, 4)])
def test_a_uniform_picks_by_the_cumulative_sum(u: float, token_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four equal tokens, in the order of their ids: each owns a quarter, its lower end included.
    monkeypatch.setattr(sampler_module, "uniform", lambda *_: u)
    assert make(SamplingParams(min_p=0.5), 5).choose(row(-9, 2, 2, 2, 2)).token_id == token_id


def test_no_token_beyond_the_candidates() -> None:
    logits = np.zeros(3000, np.float32)
    tokens = drawn(SamplingParams(temperature=100.0), logits, count=2000)
    assert max(tokens) < MAX_CANDIDATES == 1024
    assert len(tokens) > 600
    assert max(drawn(SamplingParams(top_k=2000), logits, count=2000)) < MAX_CANDIDATES


VOCAB = 24
LOGITS = st.lists(st.floats(-20, 20, width=32) | st.sampled_from([0.0, -0.0, 1.0]), min_size=VOCAB, max_size=VOCAB).map(
    lambda values: row(*values)
)


@st.composite
def options(draw: st.DrawFn) -> SamplingParams:
    ids = st.integers(0, VOCAB - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 5.0])),
        top_k=draw(st.sampled_from([-1, 0, 1, 3, 20, 100])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.9])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.5, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])),
        logit_bias=draw(st.dictionaries(ids, st.sampled_from([-100.0, 1.5]), max_size=3)),
        min_tokens=draw(st.integers(0, 3)),
        stop_token_ids=draw(st.lists(ids, max_size=2)),
    )


CASES = given(
    params=options(),
    logits=LOGITS,
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    seed=st.integers(0, 2**32),
)


def check_against_the_reference(
    params: SamplingParams, logits: np.ndarray, prompt: list[int], output: list[int], seed: int
) -> None:
    sampler = make(params, VOCAB, prompt_ids=prompt, seed=seed, sequence=2, eos_token_ids=[7])
    for token_id in output:
        sampler.observe(token_id)
    u = uniform(seed, 2, len(output))
    ends = [7, *params.stop_token_ids]
    expected, margin = reference_choice(logits, params, prompt=prompt, output=output, u=u, ends=ends)
    got = sampler.choose(logits.copy()).token_id
    if got != expected:  # float32 penalties against float64 ones may fall on two sides of an edge, and only there
        penalised = params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
        assert margin < 1e-4 or (penalised and adjacent(logits, params, got, expected, prompt, output))


test_equals_the_slow_reference = settings(max_examples=100)(CASES(check_against_the_reference))
test_equals_the_slow_reference_in_many_cases = pytest.mark.slow(
    settings(max_examples=10_000)(CASES(check_against_the_reference))
)


def adjacent(logits: np.ndarray, params: SamplingParams, a: int, b: int, prompt: list[int], output: list[int]) -> bool:
    """Whether two tokens tie within float32 rounding once penalised."""

    def score(i: int) -> float:
        z = float(logits[i]) + (params.logit_bias or {}).get(i, 0.0)
        if i in prompt or i in output:
            z = z / params.repetition_penalty if z > 0 else z * params.repetition_penalty
        times = output.count(i)
        return z - params.frequency_penalty * times - params.presence_penalty * (times > 0)

    return abs(score(a) - score(b)) < 1e-4


@settings(deadline=None)
@given(logits=LOGITS, seed=st.integers(0, 2**32), temperature=st.sampled_from([0.01, 1.0, 100.0]))
def test_every_one_token_cut_is_greedy(logits: np.ndarray, seed: int, temperature: float) -> None:
    greedy = make(SamplingParams(temperature=0), VOCAB).choose(logits).token_id
    for cut in ({"top_k": 1}, {"top_p": 1e-9}):
        params = SamplingParams(temperature=temperature, **cut)  # type: ignore[arg-type]
        assert make(params, VOCAB, seed=seed).choose(logits).token_id == greedy


@settings(deadline=None)
@given(logits=LOGITS, seed=st.integers(0, 2**32))
def test_options_at_their_neutral_value_change_nothing(logits: np.ndarray, seed: int) -> None:
    plain = make(SamplingParams(), VOCAB, seed=seed).choose(logits).token_id
    neutral = SamplingParams(top_k=VOCAB, top_p=1.0, min_p=0.0, logit_bias={3: 0.0}, logprobs=2)
    before = logits.copy()
    assert make(neutral, VOCAB, seed=seed).choose(logits).token_id == plain
    np.testing.assert_array_equal(logits, before)


# -- the distribution


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 0.4}, [4 / 9, 3 / 9, 2 / 9, 0]),
    ],
)
def test_chi_square_of_draws(options: dict[str, Any], probabilities: list[float]) -> None:
    logits = np.log(row(0.4, 0.3, 0.2, 0.1)) + np.float32(3)
    sampler = make(SamplingParams(**options), 4, seed=20)
    draws = 8000
    counts = np.bincount([sampler.choose(logits).token_id for _ in range(draws)], minlength=4)
    expected = np.array(probabilities) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
    # The 99.9% points of chi-square for 1, 2 and 3 degrees of freedom; the seed is fixed, so this cannot flicker.
    assert chi_square < {1: 10.83, 2: 13.82, 3: 16.27}[int(possible.sum()) - 1]


def test_same_seed_same_tokens_and_sequences_differ() -> None:
    logits = np.zeros(1000, np.float32)

    def tokens(seed: int, sequence: int) -> list[int]:
        sampler = make(SamplingParams(), 1000, seed=seed, sequence=sequence)
        return [sampler.choose(logits).token_id for _ in range(20)]

    assert tokens(5, 0) == tokens(5, 0)
    assert tokens(5, 0) != tokens(5, 1)
    assert tokens(5, 0) != tokens(6, 0)
    # Over equal logits the draw is the uniform number itself, scaled to the vocabulary.
    assert tokens(5, 0) == [int(uniform(5, 0, index) * 1000) for index in range(20)]


# -- log probabilities


def test_logprobs_by_hand() -> None:
    logits = np.log(row(0.25, 0.5, 0.125, 0.125)) + np.float32(7)
    choice = make(SamplingParams(temperature=0, logprobs=3, logit_bias={3: 50}), 4).choose(logits)
    assert choice.token_id == 3
    assert choice.logprob == pytest.approx(math.log(0.125), abs=1e-6)
    assert [token_id for token_id, _ in choice.top_logprobs] == [1, 0, 2]
    assert [value for _, value in choice.top_logprobs] == pytest.approx(
        [math.log(0.5), math.log(0.25), math.log(0.125)], abs=1e-6
    )
    assert make(SamplingParams(temperature=0), 4).choose(logits).logprob is None
    only = make(SamplingParams(temperature=0, logprobs=0), 4).choose(logits)
    assert (only.logprob, only.top_logprobs) == (pytest.approx(math.log(0.5), abs=1e-6), ())
    assert len(make(SamplingParams(logprobs=20), 4).choose(logits).top_logprobs) == 4


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.1, 3.0, 40.0]))
def test_logprobs_equal_float64_log_softmax(seed: int, scale: float) -> None:
    logits = (np.random.default_rng(seed).standard_normal(5000) * scale).astype(np.float32)
    choice = make(SamplingParams(temperature=0.3, top_k=5, logprobs=4), 5000, seed=seed).choose(logits)
    wide = logits.astype(np.float64)
    exact = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    assert choice.logprob == pytest.approx(exact[choice.token_id], abs=2e-6)
    expected = sorted(range(5000), key=lambda i: (-wide[i], i))[:4]
    assert [token_id for token_id, _ in choice.top_logprobs] == expected
    assert [value for _, value in choice.top_logprobs] == pytest.approx(exact[expected], abs=2e-6)


def test_extreme_logits_do_not_overflow() -> None:
    logits = row(3e38, -3e38, 3.1e38, 0)
    params = SamplingParams(temperature=1e-5, repetition_penalty=100, logprobs=2)
    choice = make(params, 4, prompt_ids=[1]).choose(logits)
    assert (choice.token_id, choice.logprob) == (2, 0.0)
