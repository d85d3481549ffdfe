"""Both scorers against the oracle: full recomputation and a log-softmax in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dmtd_export.bundle.export import export_bundle
from dmtd_export.evaluate import bundle_scorer, torch_scorer
from dmtd_export.evaluate.bundle_scorer import BundleScorer
from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.scorer import Scorer, ScoreRequest, TokenScores, phases, score_pair
from dmtd_export.evaluate.torch_scorer import TorchScorer
from dmtd_export.options import ExportOptions
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import LEGAL_CONVENTIONS, DmtdSpec
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import gates, teacher_forced
from dmtd_models.reference.testing import write_tiny_checkpoint

# Every convention, with and without encoding layers.
CASES = list(zip([(0, 3, 1), (1, 1, 2), (1, 2, 1)], LEGAL_CONVENTIONS, strict=True))
IDS = tuple(np.random.default_rng(0).integers(0, 128, 330).tolist())
REQUESTS = [
    ScoreRequest(token_ids=IDS[:n], prompt_len=p, plain=plain, first_row=first)
    # longer than a window of the graphs; another prompt length; the same prefix; a single row; a single token
    for n, p, first in ((330, 7, 0), (300, 9, 270), (40, 9, 8), (41, 9, 39), (30, 30, 29), (1, 1, 0), (40, 9, 8))
    for plain in (False, True)
]


class Made:
    """A checkpoint and its bundle under one split and convention."""

    def __init__(self, directory: Path, split: tuple[int, int, int], convention: tuple[str, str]) -> None:
        names = ("num_encoding_layers", "num_thinking_layers", "num_decoding_layers")
        fields = {**dict(zip(names, split, strict=True)), "mtp_horizon": 3}
        recorded = {**fields, "cycle_origin": convention[0], "prompt_input": convention[1]}
        write_tiny_checkpoint(directory / "checkpoint", dmtd=recorded, max_positions=512)
        self.bundle = directory / "bundle"
        export_bundle(directory / "checkpoint", self.bundle, ExportOptions(max_num_seqs=1))
        with open_checkpoint(directory / "checkpoint") as checkpoint:
            assert checkpoint.dmtd is not None
            self.spec: DmtdSpec = checkpoint.dmtd
            self.scorer = TorchScorer.open(checkpoint, self.spec)
            self.oracle = DmtdModel.from_reader(checkpoint.config, self.spec, checkpoint.read, torch.float64)

    def expected(self, request: ScoreRequest) -> TokenScores:
        logits = teacher_forced(self.oracle, request.token_ids, request.prompt_len, request.plain)
        logprobs = logits.log_softmax(-1)[request.first_row :]
        targets = torch.tensor(request.token_ids[request.first_row + 1 :], dtype=torch.int64)
        chosen = logprobs[:-1].gather(1, targets[:, None])[:, 0]
        return TokenScores(target_logprobs=chosen.numpy(), top1=logprobs.argmax(-1).numpy())


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda case: f"E{case[0][0]}-{'-'.join(case[1])}",
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), *request.param)


def check(scorer: Scorer, made: Made, requests: list[ScoreRequest]) -> None:
    for request, got in zip(requests, scorer.score(requests), strict=True):
        wanted = made.expected(request)
        assert got.target_logprobs.shape == (len(request.token_ids) - 1 - request.first_row,)
        np.testing.assert_allclose(got.target_logprobs, wanted.target_logprobs, atol=3e-5)
        # Random logits of this size have no ties within rounding: the likeliest token is the same.
        np.testing.assert_array_equal(got.top1, wanted.top1)


def test_torch_scorer_equals_the_oracle(made: Made) -> None:
    check(made.scorer, made, REQUESTS)


@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
def test_bundle_scorer_equals_the_oracle(made: Made, dialect: str) -> None:
    with BundleScorer(made.bundle, threads=1, dialect=dialect) as scorer:  # type: ignore[arg-type]
        check(scorer, made, REQUESTS)
        # Caches hold other sequences by now: the order must not matter.
        check(scorer, made, REQUESTS[::-1])


def test_large_vocabularies_are_scored_in_chunks(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary_bytes = 4 * 128
    monkeypatch.setattr(torch_scorer, "HEAD_BYTES", 7 * vocabulary_bytes)
    check(made.scorer, made, REQUESTS[:4])
    monkeypatch.setattr(bundle_scorer, "LOGIT_BYTES", 20 * vocabulary_bytes)
    with BundleScorer(made.bundle, threads=1) as scorer:
        assert scorer.logit_chunk == 16
        check(scorer, made, REQUESTS[:4])


def test_bfloat16_is_near(made: Made) -> None:
    """Logits here reach about 10, where bfloat16 steps are 1/16; the mean over many rows hides little of a wrong gate."""
    with open_checkpoint(made.bundle.parent / "checkpoint") as checkpoint:
        scorer = TorchScorer.open(checkpoint, made.spec, dtype="bfloat16")
    for request, got in zip(REQUESTS[:2], scorer.score(REQUESTS[:2]), strict=True):
        apart = np.abs(got.target_logprobs - made.expected(request).target_logprobs)
        assert 0 < apart.mean() < 0.1


def test_both_modes_of_one_model_in_one_call(made: Made) -> None:
    requests = [r for r in REQUESTS if not r.plain]
    ours, plain = score_pair(made.scorer, made.scorer, requests)
    for request, mine, theirs in zip(requests, ours, plain, strict=True):
        base = ScoreRequest(
            token_ids=request.token_ids, prompt_len=request.prompt_len, plain=True, first_row=request.first_row
        )
        np.testing.assert_allclose(mine.target_logprobs, made.expected(request).target_logprobs, atol=3e-5)
        np.testing.assert_allclose(theirs.target_logprobs, made.expected(base).target_logprobs, atol=3e-5)


def test_phases_follow_the_gates(made: Made) -> None:
    """A row of phase 0 reads both inputs, one inside a cycle the hidden state alone."""
    hidden, thought = gates(made.spec, prompt_len=8, total_len=20)
    at = phases(made.scorer.cycle, prompt_len=8, num_rows=20)
    cyclical = at >= 0
    np.testing.assert_array_equal(thought[cyclical] == 1, at[cyclical] == 0)
    assert (hidden[cyclical] == 1).all()
    assert cyclical.all() if made.spec.cycle_origin == "absolute" else (at[:8] == -1).all()


def test_what_the_model_cannot_take_is_refused(made: Made) -> None:
    with BundleScorer(made.bundle, threads=1) as scorer:
        for one in (made.scorer, scorer):
            with pytest.raises(EvaluateError, match="got 513 tokens, expected at most 512"):
                one.score([ScoreRequest(token_ids=(1,) * 513, prompt_len=1, plain=False)])
            with pytest.raises(EvaluateError, match="got 128, expected 0 to 127"):
                one.score([ScoreRequest(token_ids=(1, 128), prompt_len=1, plain=False)])
