"""What a trained token costs in matrix products, and how many of them the device can do: the share that a log line tells."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from dmtd_models.finetune.options import TrainOptions
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.layers import DecoderLayer


def flops_per_token(base: DmtdModel, options: TrainOptions, *, stored: bool, learnt: float) -> float:
    """Matrix-product operations of one trained token, attention over its document left out.

    A trained layer costs three forward passes (forward, gradient of the input, gradient of the weights), a layer that only passes
    gradients on two, a frozen one below it one. The head works on the share ``learnt`` of rows alone, those that carry a loss.
    """
    layers = base.model.layers
    one_layer = 2.0 * sum(p.numel() for p in _linear_weights(layers[0]))
    frozen = options.frozen_layers(base.spec)
    above = len(layers) - frozen
    total = above * (2.0 if options.trained == "lora" else 3.0) * one_layer
    if not stored:
        total += frozen * one_layer
        if options.loss.distill > 0:
            total += above * one_layer  # the teacher's
    head = learnt * 2.0 * base.config.vocab_size * base.config.hidden_size
    sparse = options.loss.distill == 0 or options.loss.top_k > 0
    sampled = sparse and options.loss.sampled_on(base.model.norm.weight.device) > 0
    if options.loss.distill > 0 and (not stored or options.loss.top_k == 0):
        total += head  # the teacher's
    passes = 3.0 if options.train_embedding else 2.0
    return total + passes * head * (0.5 if sampled else 1.0)  # about half of the columns, with 32 targets a row


def _linear_weights(layer: DecoderLayer) -> list[torch.Tensor]:
    return [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of this device's linear layer at a favourable shape, measured for a moment."""
    size = 2048 if device.type == "cpu" else 8192
    rows, weight = (
        torch.ones(size, 1024, dtype=dtype, device=device),
        torch.ones(size, 1024, dtype=dtype, device=device),
    )
    best = math.inf
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        nn.functional.linear(rows, weight)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size * size * 1024 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
