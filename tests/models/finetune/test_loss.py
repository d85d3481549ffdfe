"""The chunked loss against plain float64 autograd over whole tables of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmtd_models.finetune.loss import Columns, DenseTargets, SparseTargets, Targets, chunked_loss, sample_columns

ROWS, HIDDEN, VOCAB = 13, 8, 50
KINDS = ("next", "top_k", "blended", "dense")


class Case:
    """Random rows, head and targets of one kind, in float64; ``q`` [rows, vocab] is the distribution written out."""

    def __init__(self, kind: str, temperature: float) -> None:
        made = torch.Generator().manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made, dtype=torch.float64)

        self.hidden, self.head = random(ROWS, HIDDEN), random(VOCAB, HIDDEN)
        self.labels = torch.randint(VOCAB, (ROWS,), generator=made)
        self.weights = torch.rand(ROWS, generator=made) + 0.1
        teacher_hidden, teacher_head = random(ROWS, HIDDEN), random(VOCAB, HIDDEN)
        teacher = torch.softmax(teacher_hidden @ teacher_head.t() / temperature, -1)
        one_hot = torch.nn.functional.one_hot(self.labels, VOCAB).double()
        if kind == "dense":
            self.q = teacher
            self.targets: Targets = DenseTargets(hidden=teacher_hidden, head=teacher_head)
            return
        top, ids = teacher.topk(4, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        kept = torch.zeros_like(teacher).scatter(-1, ids, top)
        share = {"next": 0.0, "top_k": 1.0, "blended": 0.7}[kind]
        self.q = share * kept + (1 - share) * one_hot
        if kind == "next":
            ids, probabilities = self.labels[:, None], torch.ones(ROWS, 1)
        elif kind == "top_k":
            probabilities = top
        else:
            # The label may stand among the likeliest tokens too: then it is named twice, and both shares count.
            ids[0, 2] = self.labels[0]
            kept = torch.zeros_like(teacher).scatter(-1, ids, top)
            self.q = share * kept + (1 - share) * one_hot
            ids = torch.cat((ids, self.labels[:, None]), -1)
            probabilities = torch.cat((share * top, torch.full((ROWS, 1), 1 - share)), -1)
        self.targets = SparseTargets(ids=ids, probabilities=probabilities.float())


def naive(case: Case, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients of hidden and head, and rows' cross entropies."""
    hidden, head = (value.clone().requires_grad_() for value in (case.hidden, case.head))
    log_p = torch.log_softmax(hidden @ head.t() / temperature, -1)
    rows = -(case.q * log_p).sum(-1)
    loss = (case.weights * rows).sum()
    loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return loss.detach(), hidden.grad, head.grad, rows.detach()


def chunked(case: Case, temperature: float, dtype: torch.dtype = torch.float64, **given: Any) -> tuple[Any, ...]:
    hidden, head = (value.to(dtype).requires_grad_() for value in (case.hidden, case.head))
    loss, rows = chunked_loss(
        hidden, head, case.targets, case.labels, case.weights, temperature=temperature, **{"chunk_rows": 4, **given}
    )
    loss.backward()
    return loss.detach(), hidden.grad, head.grad, rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_autograd(kind: str, temperature: float) -> None:
    case = Case(kind, temperature)
    expected = naive(case, temperature)
    loss, grad_hidden, grad_head, rows = chunked(case, temperature)
    # Sums over a row and the head's gradient are kept in float32, hence 1e-6 rather than 1e-12.
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(grad_hidden, expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_head.double(), expected[2], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(rows.cross_entropy.double(), expected[3], rtol=5e-6, atol=1e-6)
    entropy = -torch.xlogy(case.q, case.q).sum(-1)
    shown = rows.entropy.double()
    if isinstance(case.targets, SparseTargets):  # a token named twice is two terms of the entropy: name it once
        once = torch.tensor([len(set(ids)) == len(ids) for ids in case.targets.ids.tolist()])
        assert bool(once.any())
        shown, entropy = shown[once], entropy[once]
    torch.testing.assert_close(shown, entropy, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_report_labels_and_arg_max_without_temperature(kind: str) -> None:
    case = Case(kind, 2.5)
    rows = chunked(case, 2.5, with_likeliest=True)[3]
    logits = case.hidden @ case.head.t()
    expected = torch.nn.functional.cross_entropy(logits, case.labels, reduction="none")
    torch.testing.assert_close(rows.label_loss.double(), expected, rtol=5e-6, atol=1e-6)
    assert rows.likeliest.tolist() == logits.argmax(-1).tolist()
    assert chunked(case, 2.5)[3].likeliest is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_chunk_does_not_matter(kind: str) -> None:
    case = Case(kind, 1.7)
    whole = chunked(case, 1.7, chunk_rows=ROWS)
    for size in (1, 5, 100):
        other = chunked(case, 1.7, chunk_rows=size)
        for left, right in zip(whole[:3], other[:3], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_bfloat16_rows_lose_rounding_only() -> None:
    case = Case("top_k", 1.0)
    loss, grad_hidden, _, _ = chunked(case, 1.0, dtype=torch.bfloat16)
    expected = naive(case, 1.0)
    # 8 bits of mantissa: 0.4% a rounding, a handful of them on the way.
    assert abs(float(loss) / float(expected[0]) - 1) < 0.02
    assert float((grad_hidden.double() - expected[1]).norm() / expected[1].norm()) < 0.02


def test_a_frozen_head_gets_no_gradient_and_a_factor_reaches_the_rows() -> None:
    case = Case("top_k", 1.0)
    hidden = case.hidden.clone().requires_grad_()
    loss, _ = chunked_loss(hidden, case.head, case.targets, case.labels, case.weights)
    (3 * loss).backward()
    assert case.head.grad is None
    torch.testing.assert_close(hidden.grad, 3 * naive(case, 1.0)[1], rtol=1e-5, atol=1e-6)


def big_case(others: int) -> tuple[Tensor, Tensor, SparseTargets, Tensor]:
    """Rows, a head of 6 named tokens and ``others`` that nothing names, targets on the named ones, labels."""
    made = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, HIDDEN, generator=made)
    head = torch.randn(6 + others, HIDDEN, generator=made) * 0.5
    ids = torch.tensor([[1, 2], [3, 4], [5, 0], [1, 3], [2, 5]])
    return hidden, head, SparseTargets(ids=ids, probabilities=torch.full((5, 2), 0.5)), torch.tensor([0, 1, 2, 3, 4])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_sample_of_columns_estimates_the_sum_without_bias(temperature: float) -> None:
    hidden, head, targets, labels = big_case(others=394)
    weights = torch.ones(5)
    logits = hidden @ head.t()
    named = (logits.gather(-1, targets.ids) / temperature).mean(-1)  # the targets' share is 0.5 each
    whole = torch.cat((torch.exp(logits).sum(-1), torch.exp(logits / temperature).sum(-1)))
    found = []
    for seed in range(400):
        columns = sample_columns(
            torch.cat((targets.ids.flatten(), labels)), 400, 60, torch.Generator().manual_seed(seed)
        )
        assert columns is not None and len(columns.ids) == 66
        assert columns.ids.unique().numel() == 66 and set(range(6)) <= set(columns.ids.tolist())
        _, rows = chunked_loss(hidden, head, targets, labels, weights, columns=columns, temperature=temperature)
        # -log p of the label is log sum - logit: the sum itself is what must be right on average. So of the loss.
        of_label = torch.exp(rows.label_loss + logits.gather(-1, labels[:, None])[:, 0])
        found.append(torch.cat((of_label, torch.exp(rows.cross_entropy + named))))
    sums = torch.stack(found).double()
    error = (sums.mean(0) - whole) / (sums.std(0) / len(sums) ** 0.5)
    assert float(error.abs().max()) < 4.0, "the mean over seeds is more than four standard errors off"
    assert float((sums.std(0) / whole).min()) > 0.005, "the sample must vary for this test to mean anything"


def test_columns_that_cover_all_are_exact() -> None:
    # 66 named and sampled columns of 66: written by hand, as sampling declines where it saves nothing.
    hidden, head, targets, labels = big_case(others=60)
    order = torch.randperm(66, generator=torch.Generator().manual_seed(1))
    place = torch.empty(66, dtype=torch.int64)
    place[order] = torch.arange(66)
    columns = Columns(ids=order, place=place, log_weight=torch.zeros(66))
    weights = torch.rand(5, generator=torch.Generator().manual_seed(2))
    one = chunked_loss(hidden, head, targets, labels, weights, with_likeliest=True)
    other = chunked_loss(hidden, head, targets, labels, weights, columns=columns, with_likeliest=True)
    torch.testing.assert_close(one[0], other[0])
    assert one[1].likeliest is not None and other[1].likeliest is not None
    assert one[1].likeliest.tolist() == other[1].likeliest.tolist()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_of_sampled_columns_are_those_of_the_weighted_sum(temperature: float) -> None:
    hidden, head, targets, _ = big_case(others=394)
    columns = sample_columns(targets.ids, 400, 60, torch.Generator().manual_seed(0))
    assert columns is not None
    mine, plain = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    given = {"columns": columns, "temperature": temperature}
    chunked_loss(mine, head, targets, targets.ids[:, 0], torch.ones(5), **given)[0].backward()
    logits = plain @ head.double().t() / temperature
    scale = torch.zeros(400, dtype=torch.float64)
    scale[columns.ids] = 394 / 60  # tokens 0 to 5 are named, 394 are not
    scale[:6] = 1.0
    total = (torch.exp(logits) * scale).sum(-1).log()
    (total - 0.5 * logits.gather(-1, targets.ids).sum(-1)).sum().backward()
    torch.testing.assert_close(mine.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("vocab", "sample"), [(128, 4096), (128, 123), (100, 78)])
def test_no_sample_where_it_would_not_be_much_less(vocab: int, sample: int) -> None:
    assert sample_columns(torch.arange(5), vocab, sample, torch.Generator()) is None


def test_the_same_generator_draws_the_same_columns() -> None:
    drawn = [sample_columns(torch.arange(5), 500, 40, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    ids = [columns.ids.tolist() for columns in drawn if columns is not None]
    assert ids[0] == ids[1] != ids[2]
