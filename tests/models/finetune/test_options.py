"""Options of a run: what contradicts each other, what follows from what is trained, and what a token costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_support import CONVENTIONS, opened, run_options, run_tiny, spec_of, write_base

from dmtd_models.errors import ConfigError
from dmtd_models.finetune.options import BatchOptions, LossOptions, TrainOptions, check_options


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("run") / "base")


def first_rate(output: Path) -> float:
    return float(json.loads((output / "log.jsonl").read_text().splitlines()[0])["learning_rate"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"curriculum": ((2, 0.5), (3, 0.4))}, "curriculum: got 3:0.4, expected cycle lengths"),
        ({"curriculum": ((4, 0.5),)}, "curriculum: goes above the cycle length 3"),
        ({"curriculum": ((0, 0.5),)}, "curriculum: got"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"loss": LossOptions(temperature=0.0)}, "temperature: got 0.0"),
        ({"loss": LossOptions(distill=0.5, top_k=0)}, "--distill"),
        ({"loss": LossOptions(top_k=601)}, "top_k: got 601, expected at most 600"),
        ({"trained": "lora", "train_embedding": True}, "train_embedding: "),
        ({"last_layers": 3}, "last_layers: got 3, --train late trains the 2 decoding layers; give --train full"),
        ({"trained": "full", "last_layers": 1}, r"last_layers: got 1, expected 2 \(D\) to 4 \(T \+ D\)"),
        ({"trained": "lora", "last_layers": 5}, "last_layers: got 5"),
        ({"tokens_per_step": 8}, "tokens_per_step: got 8"),
        ({"epochs": 0.0}, "epochs: got 0.0"),
        ({"seed": -1}, "seed: got -1, expected 0 to 4294967295"),
        ({"lora_rank": 4}, "lora_rank: has no effect without --train lora"),
        ({"loss": LossOptions(distill=0.0, temperature=2.0)}, "temperature: has no effect without --distill above 0"),
        ({"loss": LossOptions(distill=0.0, top_k=5)}, "top_k: has no effect"),
        ({"batch": BatchOptions(cycle_lengths="often")}, "cycle_lengths: got often, expected fixed or varied"),
        ({"trained": "full", "cache_features": True}, "cache_features: has no effect without frozen layers"),
    ],
)
def test_options_that_contradict_each_other(base: Path, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_tiny(base, tmp_path / "run", run_options(**given))
    assert not (tmp_path / "run").exists()


def test_varied_lengths_under_an_absolute_origin_are_refused() -> None:
    with pytest.raises(ConfigError, match="cycle_lengths: got varied with cycle origin absolute"):
        check_options(TrainOptions(batch=BatchOptions(cycle_lengths="varied")), spec_of(CONVENTIONS[0], cycle=3))


@pytest.mark.parametrize(("trained", "rate"), [("late", 1e-3), ("full", 3e-4), ("lora", 1e-3)])
def test_learning_rate_by_kind(base: Path, tmp_path: Path, trained: str, rate: float) -> None:
    options = run_options(trained=trained, learning_rate=None, schedule="linear", warmup=0.0, max_tokens=10)
    run_tiny(base, tmp_path, options)
    assert first_rate(tmp_path) == pytest.approx(rate, rel=1e-6), "the first step's, before it falls"


def test_a_run_of_one_step_learns(base: Path, tmp_path: Path) -> None:
    result = run_tiny(base, tmp_path, run_options(max_tokens=10, learning_rate=1e-3))
    assert result.steps == 1 and first_rate(tmp_path) == pytest.approx(1e-3)


def test_matrix_products_of_a_token(base: Path) -> None:
    """By hand: hidden 64, so many weights a layer; the head only for rows with a loss."""
    from dmtd_models.finetune.cost import flops_per_token
    from dmtd_models.reference.dmtd import DmtdModel

    with opened(base, decoding_layers=2, cycle_length=3) as (checkpoint, spec):
        model = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32)
    config = checkpoint.config
    hidden, head = config.hidden_size, config.head_dim
    layer = 2 * hidden * (2 * config.num_heads * head + 2 * config.num_kv_heads * head + 3 * config.intermediate_size)
    vocab = 2 * 600 * hidden
    whole = LossOptions(top_k=2, vocab_sample=0)
    late = run_options(loss=whole)
    assert flops_per_token(model, late, stored=True, learnt=0.25) == 3 * 2 * layer + 0.25 * 2 * vocab
    not_stored = (
        2 * layer + 3 * 2 * layer + 2 * layer + 0.5 * 3 * vocab
    )  # trunk, student, teacher; the teacher's head too
    assert flops_per_token(model, late, stored=False, learnt=0.5) == not_stored
    last = run_options(loss=whole, trained="full", last_layers=3)
    assert flops_per_token(model, last, stored=True, learnt=0.25) == 3 * 3 * layer + 0.25 * 2 * vocab
    assert flops_per_token(model, last, stored=False, learnt=0.5) == layer + 3 * 3 * layer + 3 * layer + 0.5 * 3 * vocab
    entropy = run_options(loss=LossOptions(distill=0, vocab_sample=0), trained="full")
    assert flops_per_token(model, entropy, stored=False, learnt=1.0) == 3 * 4 * layer + 2 * vocab
    embedding = run_options(loss=LossOptions(distill=0, vocab_sample=0), trained="full", train_embedding=True)
    assert flops_per_token(model, embedding, stored=False, learnt=1.0) == 3 * 4 * layer + 3 * vocab
