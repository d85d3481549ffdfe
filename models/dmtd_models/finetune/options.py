"""What ``dmtd finetune`` may be told: the defaults of command and library, and which options contradict each other.

``Job`` is a whole run, of which ``TrainOptions`` is the training. Nothing here needs torch, so that the command line can show
its defaults without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from dmtd_models.checkpoints.delta import MOST_BITS
from dmtd_models.config.model import DmtdSpec, SplitOptions
from dmtd_models.errors import ConfigError

if TYPE_CHECKING:
    import torch

Trained = Literal["full", "late", "lora"]
Schedule = Literal["linear", "cosine", "warmup_stable_decay"]
CycleLengths = Literal["fixed", "varied"]
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
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """The objective. ``distill`` 1 learns the plain model's distribution, 0 the next tokens, between them both."""

    distill: float = 1.0
    top_k: int = 32  # tokens of the plain model's distribution that are learnt; 0 for the whole vocabulary
    temperature: float = 1.0
    # Tokens drawn to stand for those that no target names; 0 to compute the whole vocabulary. By default 4096 on a CPU, where it
    # saves a third of a step, and 0 elsewhere.
    vocab_sample: int | None = None
    chunk_rows: int | None = (
        None  # rows whose logits stand in memory at a time; by default 128 on a CPU, 1024 elsewhere
    )

    def sampled_on(self, device: torch.device) -> int:
        """``vocab_sample`` as it holds on a device."""
        return self.vocab_sample if self.vocab_sample is not None else 4096 if device.type == "cpu" else 0

    def rows_on(self, device: torch.device) -> int:
        """``chunk_rows`` as it holds on a device."""
        return self.chunk_rows if self.chunk_rows is not None else 128 if device.type == "cpu" else 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What of a document is learnt."""

    learn_prompt: bool = False  # also the rows of a prompt (under origin prompt)
    vary_phase: bool = True  # begin the answer's first cycle 0 .. tau - 1 tokens later, anew each epoch (origin prompt)
    # varied: each 1 .. tau, drawn anew each epoch, as cycles that are left early have it
    cycle_lengths: CycleLengths = "fixed"


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
    precision: Precision | None = None  # None: what the device computes fast, see ``usual_precision``
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to train from, on what, and what to keep."""

    base: Path
    output: Path
    split: SplitOptions = field(default_factory=SplitOptions)
    initial: Path | None = None  # an adapter of an earlier run to go on from
    data: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    decontaminate: tuple[str, ...] = ()  # files of what must not be trained on
    answer_tokens: int = 0
    questions: Path | None = None  # prompts for the base to answer; None: it asks itself
    max_length: int = 1024
    save: Literal["checkpoint", "adapter", "both"] = "checkpoint"
    adapter_bits: int = MOST_BITS  # of a trained weight's difference, where it is not a lora
    device: Literal["cpu", "cuda"] | None = None  # None: cuda where there is one
    threads: int | None = None  # of the CPU; None: as PyTorch chooses
    feature_dir: Path | None = None
    train: TrainOptions = field(default_factory=TrainOptions)


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
    lengths = options.batch.cycle_lengths
    if lengths not in get_args(CycleLengths):
        raise ConfigError(f"got {lengths}, expected {' or '.join(get_args(CycleLengths))}", param="cycle_lengths")
    if lengths == "varied" and spec.cycle_origin != "prompt":
        raise ConfigError(
            "got varied with cycle origin absolute, whose heads stand where the count of positions puts them; leave it out, or "
            "give --cycle-origin prompt",
            param="cycle_lengths",
        )
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
    usual, loss = TrainOptions(), options.loss
    useless = {
        "lora_rank": (options.trained != "lora" and options.lora_rank != usual.lora_rank, "--train lora"),
        "temperature": (loss.distill == 0 and loss.temperature != usual.loss.temperature, "--distill above 0"),
        "top_k": (loss.distill == 0 and loss.top_k != usual.loss.top_k, "--distill above 0"),
        "cache_features": (options.cache_features is True and not options.frozen_layers(spec), "frozen layers"),
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
