"""The graphs that choose tokens, run in ONNX Runtime: equal to the numpy sampler, and right by a chi-square test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from dmtd_export.graphs.token_choice import write_choose_token, write_sample_token
from dmtd_export.graphs.writer import GraphWriter
from dmtd_runtime.errors import BackendError, RequestError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import MAX_CANDIDATES, NO_CHOICE, NOT_FINITE, Sampler, uniform

VOCAB = 3000
EDGE = 1e-5
TABLES = {
    "logit_bias": np.float32,
    "end_ids": np.bool_,
    "prompt_seen": np.bool_,
    "output_counts": np.float32,
}
DTYPES = {"top_k": np.int64, "mask_ends": np.bool_}
EOS = (7, 11)

OPTIONS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=5),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.8, top_k=40, top_p=0.9, min_p=0.02),
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(presence_penalty=1.2, frequency_penalty=-0.7),
    SamplingParams(temperature=0.0, repetition_penalty=0.6, presence_penalty=-1.0, frequency_penalty=0.3),
    SamplingParams(logit_bias={3: 6.0, 9: -100.0, VOCAB - 1: 5.5}),
    SamplingParams(min_tokens=40, stop_token_ids=(2, 5)),
    SamplingParams(temperature=100.0),
    SamplingParams(temperature=1e-4),
]


def session_of(write: Any, name: str, *sizes: int) -> Any:
    writer = GraphWriter(name, {})
    write(writer, *sizes)
    model = writer.finish("0", name)
    onnx.checker.check_model(model, full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), settings)


@pytest.fixture(scope="module")
def sample() -> Any:
    return session_of(write_sample_token, "sample_token", VOCAB, MAX_CANDIDATES)


def inputs_of(samplers: Sequence[Sampler]) -> dict[str, np.ndarray]:
    """What a runtime hands to the graph, taken from the samplers."""
    feeds: dict[str, np.ndarray] = {name: np.ones((len(samplers), VOCAB), dtype) for name, dtype in TABLES.items()}
    for row, sampler in enumerate(samplers):
        sampler.fill_tables({name: feeds[name][row] for name in TABLES})
        for name, number in {**sampler.device_numbers(), **sampler.device_step(0)}.items():
            dtype = DTYPES.get(name, np.float32)
            feeds.setdefault(name, np.zeros(len(samplers), dtype))[row] = number
    return feeds


def sampler_of(params: SamplingParams, seed: int, prompt: Sequence[int] = (1, 2, 3, 250)) -> Sampler:
    return Sampler(params, vocab_size=VOCAB, prompt_ids=prompt, seed=seed, eos_token_ids=EOS)


def edges_of(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Where the cumulative distribution over the candidates steps, by the rules as they are written, in float64."""
    values = np.sort(logits.astype(np.float64))[::-1][:MAX_CANDIDATES]
    likely = np.exp((values - values[0]) / params.temperature)
    keep = likely >= params.min_p
    keep[params.top_k or len(keep) :] = False
    likely = np.where(keep, likely, 0)
    before = np.concatenate([[0.0], np.cumsum(likely)[:-1]])
    if params.top_p < 1:
        likely = np.where(before < params.top_p * likely.sum(), likely, 0)
    edges: np.ndarray = np.cumsum(likely) / likely.sum()
    return edges


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_graph_chooses_what_the_sampler_chooses(sample: Any, scale: float) -> None:
    """Mixed rows, 40 tokens each, the counts carried along by the graph itself."""
    rng = np.random.default_rng(3)
    by_graph, by_numpy = ([sampler_of(params, seed) for seed, params in enumerate(OPTIONS)] for _ in range(2))
    feeds = inputs_of(by_graph)
    near_an_edge = 0
    for index in range(40):
        logits = (scale * rng.standard_normal((len(OPTIONS), VOCAB))).astype(np.float32)
        logits[:, :16] += 2.5 * scale  # so that ids repeat and the penalties have work
        fresh = inputs_of(by_graph)
        for name in ("uniforms", "mask_ends"):
            feeds[name] = fresh[name]
        np.testing.assert_array_equal(feeds["output_counts"][9:12], fresh["output_counts"][9:12])
        feeds["logits"] = logits[:, None]
        tokens, finite, has_choice, sure, feeds["output_counts"] = sample.run(None, feeds)
        assert finite.all() and has_choice.all()
        # Of the logits as they came in, whatever the options.
        softmax = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
        np.testing.assert_allclose(sure[:, 0], softmax.max(-1), rtol=1e-5)
        for row, (params, sampler) in enumerate(zip(OPTIONS, by_numpy, strict=True)):
            adjusted = sampler._adjusted(logits[row])
            wanted, token = sampler.choose(logits[row]).token_id, int(tokens[row, 0])
            if token != wanted:
                assert not params.greedy
                gap = np.abs(edges_of(adjusted, params) - uniform(row, 0, index)).min()
                assert gap < EDGE, f"{params}: {token} for {wanted}, {gap:.1e} from an edge"
                near_an_edge += 1
            feeds["output_counts"][row, token] -= 1  # both go on with the sampler's token
            feeds["output_counts"][row, wanted] += 1
            by_graph[row].take(wanted)
    assert near_an_edge <= 3


def test_the_distribution_is_right(sample: Any) -> None:
    """Chi-square of 20,000 draws over the 12 tokens that top_k leaves, 11 degrees of freedom, against their softmax."""
    logits = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32) * 2
    params, draws, rows = SamplingParams(temperature=1.5, top_k=12), 20_000, 1000
    feeds = {name: np.repeat(array, rows, axis=0) for name, array in inputs_of([sampler_of(params, 0)]).items()}
    feeds["logits"] = np.broadcast_to(logits, (rows, 1, VOCAB)).copy()
    counts = np.zeros(VOCAB)
    random = np.random.default_rng(1)
    for _ in range(draws // rows):
        feeds["uniforms"] = random.random(rows, dtype=np.float32)
        counts += np.bincount(sample.run(["token_ids"], feeds)[0][:, 0], minlength=VOCAB)
    top = np.argsort(-logits)[:12]
    shares = np.exp(logits[top].astype(np.float64) / 1.5)
    expected = draws * shares / shares.sum()
    assert counts[top].sum() == draws
    assert ((counts[top] - expected) ** 2 / expected).sum() < 31.3  # p = 0.001


def test_the_largest_uniform_takes_the_last_kept_candidate(sample: Any) -> None:
    """Masked tokens and those of no width are never taken, whatever rounding does."""
    logits = np.full((2, 1, VOCAB), -200.0, np.float32)
    logits[0, 0, [4, 8, 20]] = [3.0, 2.0, 1.0]
    logits[1, 0, [7, 4]] = [5.0, 1.0]  # 7 is an end of sequence, and masked
    feeds = inputs_of([sampler_of(SamplingParams(), 0), sampler_of(SamplingParams(min_tokens=1), 0)])
    feeds |= {"logits": logits, "uniforms": np.full(2, np.nextafter(np.float32(1), np.float32(0)), np.float32)}
    assert sample.run(["token_ids"], feeds)[0][:, 0].tolist() == [20, 4]


def test_uniforms_stay_below_one() -> None:
    sampler = sampler_of(SamplingParams(), 5)
    for ahead in range(200):
        assert abs(sampler.device_step(ahead)["uniforms"] - uniform(5, 0, ahead)) < 1e-7
    assert np.float32(max(sampler.device_step(ahead)["uniforms"] for ahead in range(200))) < 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_told_and_give_an_id_in_range(sample: Any, bad: float) -> None:
    logits = np.zeros((3, 1, VOCAB), np.float32)
    logits[1, 0, 77] = bad
    feeds = inputs_of([sampler_of(SamplingParams(), 0)] * 3) | {"logits": logits}
    tokens, finite, *_ = sample.run(None, feeds)
    assert finite[:, 0].tolist() == [True, False, True]
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    choose = session_of(write_choose_token, "choose_token", VOCAB)
    tokens, finite, sure = choose.run(None, {"logits": logits})
    assert finite[:, 0].tolist() == [True, False, True]
    assert sure[::2, 0] == pytest.approx([1 / VOCAB] * 2)
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


def test_nothing_to_choose_from_is_told(sample: Any) -> None:
    sampler = sampler_of(SamplingParams(min_tokens=3), 0)
    feeds = inputs_of([sampler]) | {"logits": np.zeros((1, 1, VOCAB), np.float32)}
    feeds["end_ids"][:] = True
    _, finite, has_choice, *_ = sample.run(None, feeds)
    assert (finite.item(), has_choice.item()) == (True, False)
    with pytest.raises(RequestError, match="leave nothing to choose from for token 0"):
        sampler.take(NO_CHOICE)
    with pytest.raises(BackendError, match="NaN or infinity for token 0"):
        sampler.take(NOT_FINITE)


def test_a_vocabulary_below_the_candidates(tmp_path: Path) -> None:
    small = session_of(write_sample_token, "sample_token", 5, MAX_CANDIDATES)
    sampler = Sampler(SamplingParams(), vocab_size=5, prompt_ids=(), seed=0)
    feeds = {name: np.zeros((1, 5), dtype) for name, dtype in TABLES.items()}
    for name, number in {**sampler.device_numbers(), "uniforms": 0.999, "mask_ends": False}.items():
        feeds[name] = np.array([number], DTYPES.get(name, np.float32))
    feeds["logits"] = np.zeros((1, 1, 5), np.float32)
    assert small.run(["token_ids"], feeds)[0].item() == 4
