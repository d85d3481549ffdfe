"""The dial: whatever does not depend on a clock is the oracle's, by full recomputation and its own decisions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dmtd_export.cli.main import app
from dmtd_export.evaluate.fluency import EVERYDAY
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.reference import oracle
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_runtime.text.tokenizer import Tokenizer

PROMPTS, NEW, TAU = EVERYDAY[:3], 12, 3
CONFIDENCES = (0.0, 0.55, 1.0)


def forced(model: DmtdModel, ids: list[int], n: int, confidence: float) -> tuple[list[int], list[torch.Tensor]]:
    """Phase and logits of every row behind the prompt of a known text, each decided by what stands before it."""
    heads: list[int] = []
    phases, rows, left = [], [], False
    for at in range(n, len(ids) - 1):
        head = not heads or left or at - heads[-1] == TAU or confidence >= 1
        logits = oracle.teacher_forced(model, ids[: at + 1], n, heads=[*heads, at] if head else heads)[-1]
        sure = 1.0 if head else float(logits.softmax(-1).max())
        left = confidence - 0.4 <= sure < confidence
        if sure < confidence - 0.4:
            head, logits = True, oracle.teacher_forced(model, ids[: at + 1], n, heads=[*heads, at])[-1]
        heads += [at] if head else []
        phases.append(at - heads[-1])
        rows.append(logits)
    return phases, rows


def read_plainly(model: DmtdModel, ids: list[int], answer: Sequence[int]) -> torch.Tensor:
    """Log probabilities of an answer's tokens under the plain model."""
    logits = oracle.teacher_forced(model, [*ids, *answer], len(ids), plain=True)[len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])


def test_the_dial_is_the_oracles(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmtd_export.evaluate.fluency.MAX_NEW_TOKENS", NEW)
    monkeypatch.setattr("dmtd_export.evaluate.fluency.EVERYDAY", PROMPTS)
    wanted = ",".join(map(str, CONFIDENCES[1:]))  # fixed cycles come by themselves
    arguments = ["evaluate", str(bundle), "--min-confidence", wanted, "--threads", "1", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "0, fixed" in result.stdout and "plain" in result.stdout
    assert (tmp_path / "quality_over_speed.png").stat().st_size > 5_000
    told = json.loads((tmp_path / "report.json").read_text())["dial"]
    assert [setting["min_confidence"] for setting in told["settings"]] == list(CONFIDENCES)

    with open_checkpoint(checkpoint) as opened:
        assert opened.dmtd is not None
        model = DmtdModel.from_reader(opened.config, opened.dmtd, opened.read, torch.float64)
    tokenizer = Tokenizer.from_directory(checkpoint)
    assert tokenizer is not None
    prompts = [
        tokenizer.encode(f"<|im_start|>user\n{each}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
        for each in PROMPTS
    ]
    plain = [oracle.greedy(model, ids, NEW, True, stop_ids=(258,)).token_ids for ids in prompts]
    own = torch.cat([read_plainly(model, ids, answer) for ids, answer in zip(prompts, plain, strict=True)])
    assert told["plain"]["nll"] == pytest.approx(-float(own.mean()), rel=1e-4)
    for setting in told["settings"]:
        confidence = setting["min_confidence"]
        nll, base_nll, agreed, phases = [], [], [], []
        for ids, answer in zip(prompts, plain, strict=True):
            text = [*ids, *answer]
            places, rows = forced(model, text, len(ids), confidence)
            theirs = oracle.teacher_forced(model, text, len(ids), plain=True)[len(ids) : -1]
            phases += places
            for row, other, token in zip(rows, theirs, answer[1:], strict=True):
                nll.append(-float(row.log_softmax(-1)[token]))
                base_nll.append(-float(other.log_softmax(-1)[token]))
                agreed.append(int(row.argmax()) == int(other.argmax()))
        assert setting["ratio"] == pytest.approx(np.exp(np.mean(nll) - np.mean(base_nll)), rel=1e-4)
        assert setting["agreement"] == pytest.approx(np.mean(agreed))
        by_phase = {str(k): np.mean(np.array(agreed)[np.array(phases) == k]) for k in sorted(set(phases))}
        assert setting["agreement_by_phase"] == pytest.approx(by_phase)
        assert sum(setting["share_by_phase"].values()) == pytest.approx(1)

        runs = [oracle.adaptive(model, ids, NEW, confidence, stop_ids=(258,)) for ids in prompts]
        kept, full = sum(len(run.token_ids) - 1 for run in runs), sum(len(run.heads) for run in runs)
        assert setting["tokens_per_full_pass"] == pytest.approx(kept / full)
        assert setting["late_steps"] == pytest.approx(sum(run.late_steps for run in runs) / kept)
        assert setting["dropped"] == pytest.approx(sum(run.dropped for run in runs) / kept)
        same = [
            next((k for k, (a, b) in enumerate(zip(run.token_ids, other, strict=False)) if a != b), len(other))
            for run, other in zip(runs, plain, strict=True)
        ]
        assert setting["matched"] == pytest.approx(np.mean(same))
        read = [read_plainly(model, ids, run.token_ids) for ids, run in zip(prompts, runs, strict=True)]
        assert setting["nll"] == pytest.approx(-float(torch.cat(read).mean()), rel=1e-4)
        for speed in (setting["speed"], setting["batch_speed"]):
            assert 0 < speed[1] <= speed[0] <= speed[2]
    assert told["settings"][1]["dropped"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.5,often", "--min-confidence: got '0.5,often'"),
        ("1.5", "--min-confidence: got 1.5, expected numbers from 0 to 1"),
    ],
)
def test_confidences_that_are_none(bundle: Path, given: str, message: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(bundle), "--min-confidence", given])
    assert result.exit_code == 2
    assert message in result.stderr
