"""Fluency on everyday prompts: likelihoods are the oracle's, shares of 3-grams known by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmtd_export.evaluate.fluency import EVERYDAY, measure_fluency
from dmtd_export.evaluate.generation import GenerationRun
from dmtd_export.evaluate.statistics import Bootstrap
from dmtd_export.evaluate.subject import OpenOptions, open_subject
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import greedy, teacher_forced
from dmtd_runtime.text.tokenizer import Tokenizer


def test_texts_and_likelihoods_are_the_oracle_s(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmtd_export.evaluate.fluency.MAX_NEW_TOKENS", 12)
    with open_subject(bundle, OpenOptions(threads=1)) as subject:
        found = measure_fluency(
            GenerationRun(bundle=bundle, plain=False, threads=1),
            GenerationRun(bundle=bundle, plain=True, threads=1),
            subject.scorer,
            Bootstrap(resamples=100, seed=0),
        )
    with open_checkpoint(checkpoint) as opened:
        assert opened.dmtd is not None
        model = DmtdModel.from_reader(opened.config, opened.dmtd, opened.read, torch.float64)
    tokenizer = Tokenizer.from_directory(checkpoint)
    assert tokenizer is not None and found.prompts == EVERYDAY and len(set(EVERYDAY)) == 20
    for voice, plain in ((found.model, False), (found.base, True)):
        total, tokens = 0.0, 0
        for number, question in enumerate(found.prompts):
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            written = greedy(model, ids, 12, plain, stop_ids=(258,)).token_ids
            assert voice.texts[number] == tokenizer.decode([token for token in written if token != 258])
            logits = teacher_forced(model, [*ids, *written], len(ids), plain=True)[len(ids) - 1 : -1]
            chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(written)[:, None])
            total -= float(chosen.sum())
            tokens += len(written)
        assert voice.nll.value == pytest.approx(total / tokens, rel=1e-4)
