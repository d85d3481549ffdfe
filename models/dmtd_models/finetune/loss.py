"""The loss over a large vocabulary, in pieces: neither logits nor their gradient ever stand in memory whole.

Every objective of fine-tuning is a cross entropy against a target distribution q of each row:

- next tokens: q is 1 at the token that follows;
- distillation from the k likeliest tokens of the plain model: q on k tokens, summing to 1;
- distillation over the whole vocabulary: q is the softmax of the plain model's own logits.

The gradient of a row's logits is softmax(logits) - q, so it is computed in the forward pass, a chunk of rows at a time, and
multiplied into the hidden rows at once. The head is frozen here; where it is trained, its gradient is gathered too.

``columns`` estimates the softmax's sum from part of the vocabulary: the columns that some target names, all of them, and a random
sample of the others, weighted so that the expected sum is the whole one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """A distribution over few tokens for each row."""

    ids: Tensor  # int64 [rows, k]
    probabilities: Tensor  # float32 [rows, k], each row summing to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTargets:
    """The plain model's own distribution: what its head makes of these rows, computed in the same chunks."""

    hidden: Tensor  # [rows, hidden], after the final norm
    head: Tensor  # [vocab, hidden]


Targets = SparseTargets | DenseTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResults:
    """What the loss says of each row, without gradients."""

    cross_entropy: Tensor  # float32 [rows], -sum q log p
    entropy: Tensor  # float32 [rows], -sum q log q
    label_loss: Tensor  # float32 [rows], -log p of the label
    likeliest: Tensor | None  # int64 [rows], the student's arg-max, where asked for


def chunked_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Targets,
    labels: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    columns: Columns | None = None,
    chunk_rows: int = 128,
    with_likeliest: bool = False,
) -> tuple[Tensor, RowResults]:
    """Weighted sum of cross entropies, with gradients for ``hidden`` (and ``head``, if it requires them).

    Args:
        hidden: [rows, hidden] after the final norm.
        head: [vocab, hidden].
        targets: the distribution to learn at each row.
        labels: int64 [rows], the tokens that follow, for the report.
        weights: float32 [rows], the factor of each row's loss.
        temperature: divides student and (dense) teacher logits; the caller has applied it to sparse targets.
        columns: the part of the vocabulary to compute, or None for all.
        chunk_rows: rows whose logits stand in memory at a time.
        with_likeliest: also find each row's likeliest token, of the computed columns.
    """
    if columns is not None:
        assert isinstance(targets, SparseTargets), "a sampled vocabulary needs targets on few tokens"
        head = head[columns.ids]
        targets = SparseTargets(ids=columns.place[targets.ids], probabilities=targets.probabilities)
        labels = columns.place[labels]
    log_weight = None if columns is None else columns.log_weight
    loss, cross_entropy, entropy, label_loss, likeliest = _ChunkedLoss.apply(
        hidden, head, targets, labels, weights, temperature, log_weight, chunk_rows, with_likeliest
    )
    if likeliest is not None and columns is not None:
        likeliest = columns.ids[likeliest]
    return loss, RowResults(cross_entropy=cross_entropy, entropy=entropy, label_loss=label_loss, likeliest=likeliest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Part of a vocabulary that stands for all of it."""

    ids: Tensor  # int64 [columns]
    place: Tensor  # int64 [vocab], the column of a token, 0 for those that have none
    log_weight: Tensor  # float32 [columns], log of how many tokens a column stands for


def sample_columns(target_ids: Tensor, vocab_size: int, sample: int, generator: torch.Generator) -> Columns | None:
    """All tokens that targets name and ``sample`` of the others; None where that is not much less than all."""
    named = torch.zeros(vocab_size, dtype=torch.bool)
    named[target_ids.flatten().cpu()] = True
    others = (~named).nonzero()[:, 0]
    if len(others) <= sample or vocab_size - len(others) + sample > 0.8 * vocab_size:
        return None
    chosen = others[torch.randperm(len(others), generator=generator)[:sample]]
    ids = torch.cat((named.nonzero()[:, 0], chosen))
    log_weight = torch.zeros(len(ids))
    log_weight[len(ids) - sample :] = torch.log(torch.tensor(len(others) / sample))
    place = torch.zeros(vocab_size, dtype=torch.int64)
    place[ids] = torch.arange(len(ids))
    device = target_ids.device
    return Columns(ids=ids.to(device), place=place.to(device), log_weight=log_weight.to(device))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Targets,
        labels: Tensor,
        weights: Tensor,
        temperature: float,
        log_weight: Tensor | None,
        chunk_rows: int,
        with_likeliest: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        rows = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        cross_entropy = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        label_loss, entropy = torch.empty_like(cross_entropy), torch.empty_like(cross_entropy)
        likeliest = torch.empty(rows, dtype=torch.int64, device=hidden.device) if with_likeliest else None
        for first in range(0, rows, chunk_rows):
            part = slice(first, min(first + chunk_rows, rows))
            logits = hidden[part] @ head.t()
            if likeliest is not None:
                likeliest[part] = logits.argmax(-1)
            divided = logits if temperature == 1.0 else logits / temperature
            # How many tokens a column stands for is no matter of temperature: weighted after the division.
            total = _weighted(logits, log_weight).logsumexp(-1, keepdim=True).float()
            label_loss[part] = (total - logits.gather(-1, labels[part, None]).float())[:, 0]
            if divided is not logits:
                logits = _weighted(divided, log_weight)
                total = logits.logsumexp(-1, keepdim=True).float()
            gradient, cross_entropy[part], entropy[part] = _gradient(logits, total, targets, part, temperature)
            gradient *= (weights[part, None] / temperature).to(gradient.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ head
            if grad_head is not None:
                grad_head += (gradient.t() @ hidden[part]).float()
        ctx.gradients = (grad_hidden, grad_head)
        ctx.mark_non_differentiable(cross_entropy, entropy, label_loss)
        if likeliest is not None:
            ctx.mark_non_differentiable(likeliest)
        return (cross_entropy * weights).sum(), cross_entropy, entropy, label_loss, likeliest

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        hidden, head = ctx.gradients
        return (
            None if hidden is None else hidden * scale.to(hidden.dtype),
            None if head is None else head * scale,
            *(None,) * 7,
        )


def _weighted(logits: Tensor, log_weight: Tensor | None) -> Tensor:
    """Logits of columns, in place as those of all the tokens that each column stands for."""
    return logits if log_weight is None else logits.add_(log_weight.to(logits.dtype))


def _gradient(
    logits: Tensor, total: Tensor, targets: Targets, part: slice, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(logits) - q of a chunk, its rows' cross entropies and the entropies of q, these in float32."""
    gradient = torch.softmax(logits, dim=-1)
    if isinstance(targets, SparseTargets):
        ids, q = targets.ids[part], targets.probabilities[part].float()
        named = logits.gather(-1, ids).float()
        gradient.scatter_add_(-1, ids, -q.to(gradient.dtype))
        return gradient, ((total - named) * q).sum(-1), -torch.xlogy(q, q).sum(-1)
    teacher = (targets.hidden[part] @ targets.head.t()) / temperature
    q = torch.softmax(teacher, dim=-1)
    # sum q (total - logits): what each row pays, without a second table of logarithms.
    cross_entropy = total[:, 0] - (q * logits).sum(-1, dtype=torch.float32)
    entropy = teacher.logsumexp(-1).float() - (q * teacher).sum(-1, dtype=torch.float32)
    return gradient - q, cross_entropy, entropy
