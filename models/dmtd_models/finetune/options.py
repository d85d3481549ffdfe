"""What ``dmtd finetune`` may be told, in one frozen description of a run. These are the defaults of command and library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch

from dmtd_models.config.model import DmtdSpec
from dmtd_models.errors import ConfigError
from dmtd_models.finetune.batches import BatchOptions
from dmtd_models.finetune.student import LossOptions, Trained

Schedule = Literal["linear", "cosine", "warmup_stable_decay"]
Precision = Literal["bfloat16", "float32"]
# Measured for late on SmolLM2-135M, D 8, tau 4: after 120,000 tokens 6e-4 / 1.5e-3 / 3e-3 gave held-out divergences of
# 2.85 / 2.64 / 2.73; over 2 M tokens (0.92 M different ones) 1.5e-3 was a little high, held-out stalled while training fell.
# full and lora are not measured.
LEARNING_RATES: Mapping[Trained, float] = MappingProxyType({"late": 1e-3, "full": 3e-4, "lora": 1e-3})


def usual_precision(device: str | None = None) -> Precision:
    """bfloat16 where ``device`` has instructions for it, else float32, which a CPU with AVX2 alone computes 7 times faster.

    Args:
        device: cpu or cuda; by default cuda where there is one.
    """
    if device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """A run: what is trained, on how many tokens, how fast it learns. Token counts are of documents, prompts included."""

    trained: Trained = "late"
    train_embedding: bool = False
    last_layers: int | None = None  # so many layers are trained; by default D for late, all for full and lora
    lora_rank: int = 32
    epochs: float = 1.0
    max_tokens: int | None = None  # ends the run earlier (or, with more epochs, later); the schedule ends there too
    tokens_per_step: int = 4096  # of one process; documents are packed into rows of so many tokens
    accumulate: int = 1  # rows of one process before the optimiser steps
    learning_rate: float | None = None  # the largest; None: by what is trained, see ``peak_learning_rate``
    schedule: Schedule = "warmup_stable_decay"
    warmup: float = 0.03  # share of all steps
    decay: float = 0.3  # share of all steps, of warmup_stable_decay
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Precision = field(default_factory=usual_precision)
    gradient_checkpointing: bool = False
    cache_features: bool | None = None  # store what frozen layers compute; by default on a CPU where a layer is frozen
    curriculum: tuple[tuple[int, float], ...] = ()  # (cycle length, share of the run until which it holds), in order
    eval_every_tokens: int = 500_000
    save_every_s: float = 300.0
    log_every_steps: int = 5
    seed: int = 0
    loss: LossOptions = field(default_factory=LossOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate: the one given, or the usual one of what is trained."""
        return LEARNING_RATES[self.trained] if self.learning_rate is None else self.learning_rate

    def first_trained_layer(self, spec: DmtdSpec) -> int:
        """The layers from this one on are trained."""
        late_start = spec.encoding_layers + spec.thinking_layers
        if self.last_layers is not None:
            return late_start + spec.decoding_layers - self.last_layers
        return late_start if self.trained == "late" else 0

    def frozen_layers(self, spec: DmtdSpec) -> int:
        """How many layers, from the first on, always give the same for a text: none where the embedding is trained."""
        return 0 if self.train_embedding else self.first_trained_layer(spec)


def check_options(options: TrainOptions, spec: DmtdSpec) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: names the option.
    """
    if spec.cycle_length < 2:
        raise ConfigError(
            f"got {spec.cycle_length}, expected 2 or more: a cycle of 1 has no late step", param="cycle_length"
        )
    loss = options.loss
    ranges = {
        "distill": (loss.distill, 0.0, 1.0),
        "temperature": (loss.temperature, 0.1, 100.0),
        "learning_rate": (options.peak_learning_rate, 1e-9, 1.0),
        "warmup": (options.warmup, 0.0, 1.0),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ConfigError(f"got {value}, expected {low} to {high}", param=name)
    if 0 < loss.distill < 1 and loss.top_k == 0:
        raise ConfigError(
            "a share between 0 and 1 needs --top-k 1 or more (the whole vocabulary: --distill 1)", param="distill"
        )
    _refuse_without_effect(options, spec)
    if options.train_embedding and options.trained == "lora":
        raise ConfigError(
            "factors leave the embedding alone; give --train late or full with it", param="train_embedding"
        )
    if options.last_layers is not None:
        _check_last_layers(options, options.last_layers, spec)
    if not 0 <= options.seed < 2**32:  # what numpy's own generator takes
        raise ConfigError(f"got {options.seed}, expected 0 to {2**32 - 1}", param="seed")
    if options.tokens_per_step < 16:
        raise ConfigError(f"got {options.tokens_per_step}, expected 16 or more", param="tokens_per_step")
    if not (math.isfinite(options.epochs) and options.epochs > 0) and options.max_tokens is None:
        raise ConfigError(f"got {options.epochs}, expected more than 0", param="epochs")
    last = 0.0
    for cycle_length, until in options.curriculum:
        if cycle_length < 1 or not last < until <= 1:
            raise ConfigError(
                f"got {cycle_length}:{until}, expected cycle lengths of 1 or more, each until a greater share of "
                "the run than the one before, 1 at most, as 2:0.3,3:0.6",
                param="curriculum",
            )
        last = until
    if options.curriculum and spec.cycle_length < max(cycle for cycle, _ in options.curriculum):
        raise ConfigError(f"goes above the cycle length {spec.cycle_length} that the run ends with", param="curriculum")


def _refuse_without_effect(options: TrainOptions, spec: DmtdSpec) -> None:
    """What is given and would change nothing was meant otherwise."""
    usual, loss = TrainOptions(precision=options.precision), options.loss
    useless = {
        "lora_rank": (options.trained != "lora" and options.lora_rank != usual.lora_rank, "--train lora"),
        "temperature": (loss.distill == 0 and loss.temperature != usual.loss.temperature, "--distill above 0"),
        "top_k": (loss.distill == 0 and loss.top_k != usual.loss.top_k, "--distill above 0"),
        "cache": (options.cache_features is True and not options.frozen_layers(spec), "frozen layers"),
    }
    for name, (given, missing) in useless.items():
        if given:
            raise ConfigError(f"has no effect without {missing}; leave it out, or give that", param=name)


def _check_last_layers(options: TrainOptions, last_layers: int, spec: DmtdSpec) -> None:
    late, reading = spec.decoding_layers, spec.thinking_layers + spec.decoding_layers
    layers = spec.encoding_layers + reading
    if options.trained == "late" and last_layers != late:
        raise ConfigError(
            f"got {last_layers}, --train late trains the {late} decoding layers; give --train full", param="last_layers"
        )
    if not late <= last_layers <= reading and last_layers != layers:
        whole = f", or {layers} for all" if layers != reading else ""
        raise ConfigError(f"got {last_layers}, expected {late} (D) to {reading} (T + D){whole}", param="last_layers")
