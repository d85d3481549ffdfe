"""The student over packed documents against the oracle, document by document, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import CONVENTIONS, documents_of, opened, spec_of
from torch import Tensor
from torch.nn import functional

from dmtd_models.config.model import DmtdSpec
from dmtd_models.finetune import packed
from dmtd_models.finetune.batches import Batch, Document, make_batch
from dmtd_models.finetune.options import BatchOptions, LossOptions, TrainOptions
from dmtd_models.finetune.run import _student
from dmtd_models.finetune.student import Student, likeliest_tokens
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import teacher_forced
from dmtd_models.reference.testing import write_tiny_checkpoint

FAMILIES = {
    "qwen3": {"tie": True},
    "qwen2": {},
    "llama": {"qkv_bias": True, "mlp_bias": True},
}
SPLITS = {"E0": {"encoding": 0, "thinking": 2}, "E2": {"encoding": 2, "thinking": 1}}
LENGTHS = [(9, 3), (14, 5), (4, 2), (11, 0)]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("student")
    return {
        name: write_tiny_checkpoint(root / name, family=name, layers=5, seed=3, **given)
        for name, given in FAMILIES.items()
    }


class Setting:
    """A student over a tiny checkpoint, the same weights as a reference model, and a batch of documents."""

    def __init__(self, checkpoint: Any, spec: DmtdSpec, **options: Any) -> None:
        given = {"precision": "float32", "trained": "late", "loss": LossOptions(distill=0), **options}
        self.checkpoint = checkpoint
        self.spec = spec
        self.base = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32).requires_grad_(False)
        self.student: Student = _student(checkpoint, self.base, TrainOptions(**given))
        self.reference = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32)
        self.documents = documents_of(LENGTHS, seed=4)
        self.batch = make_batch(self.documents, spec, BatchOptions(vary_phase=False), np.random.default_rng(7))

    def run(self, batch: Batch | None = None, **given: Any) -> Any:
        inputs = {name: value for name, value in (batch or self.batch).items() if name not in ("phase", "rows")}
        return self.student(**inputs, **given)

    def logits(self, plain: bool = False) -> Tensor:
        """The oracle's logits at the rows that carry loss."""
        parts = []
        for document, start in zip(self.documents, self.batch["starts"].tolist()[:-1], strict=True):
            prompt = prompt_of(document, self.batch, start, self.spec)
            rows = teacher_forced(self.reference, document.token_ids.tolist(), prompt, plain=plain)
            inside = self.batch["loss_rows"]
            inside = inside[(inside >= start) & (inside < start + len(document.token_ids))] - start
            parts.append(rows[inside])
        return torch.cat(parts).double()


def prompt_of(document: Document, batch: Batch, start: int, spec: DmtdSpec) -> int:
    """The length of the prompt, that of a free text read off its first loss row."""
    if document.prompt_len or spec.cycle_origin == "absolute":
        return document.prompt_len
    return next(row for row in batch["loss_rows"].tolist() if row >= start) - start + 1


@pytest.fixture
def setting(checkpoints: dict[str, Path]) -> Iterator[Any]:
    with opened(checkpoints["qwen3"], decoding_layers=2, cycle_length=3) as (checkpoint, _):
        yield lambda spec=None, **options: Setting(checkpoint, spec or spec_of(thinking=3), **options)


@pytest.mark.parametrize("convention", CONVENTIONS, ids="+".join)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_next_token_loss_is_the_oracles(
    checkpoints: dict[str, Path], family: str, split: str, convention: tuple[str, str]
) -> None:
    with opened(checkpoints[family], decoding_layers=2, cycle_length=3) as (checkpoint, _):
        sizes = SPLITS[split]
        spec = spec_of(convention, **sizes, decoding=5 - sum(sizes.values()))
        made = Setting(checkpoint, spec)
        result = made.run()
        expected = functional.cross_entropy(made.logits(), made.batch["labels"], reduction="none")
        torch.testing.assert_close(result.label_loss.double(), expected, **TOLERANCE)
        torch.testing.assert_close(result.loss.double(), expected.mean(), **TOLERANCE)
        torch.testing.assert_close(result.divergence, result.label_loss)


TRAINED: dict[str, dict[str, Any]] = {
    "late": {"trained": "late"},
    "full": {"trained": "full"},
    "last": {"trained": "full", "last_layers": 3},  # of two late layers
    "lora": {"trained": "lora"},
    "lora-last": {"trained": "lora", "last_layers": 4},
}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("convention", CONVENTIONS, ids="+".join)
def test_distillation_is_the_divergence_from_the_plain_oracle(
    setting: Any, convention: tuple[str, str], trained: str
) -> None:
    made = setting(spec_of(convention, thinking=3), **TRAINED[trained], loss=LossOptions(top_k=0))
    result = made.run(report_agreement=True)
    student, teacher = (torch.log_softmax(logits, -1) for logits in (made.logits(), made.logits(plain=True)))
    expected = (teacher.exp() * (teacher - student)).sum(-1)
    torch.testing.assert_close(result.divergence.double(), expected, **TOLERANCE)
    assert result.agrees.tolist() == (student.argmax(-1) == teacher.argmax(-1)).float().tolist()
    cross_entropy = -(teacher.exp() * student).sum(-1)
    torch.testing.assert_close(result.loss.double(), cross_entropy.mean(), **TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_likeliest_tokens_are_renormalised_and_labels_take_their_share(setting: Any, temperature: float) -> None:
    options = LossOptions(top_k=5, distill=0.6, temperature=temperature, vocab_sample=0)
    made = setting(loss=options)
    result = made.run(report_agreement=True)
    student = torch.log_softmax(made.logits() / temperature, -1)
    plain = made.logits(plain=True)
    values, ids = plain.topk(5, dim=-1)
    q = torch.zeros_like(plain).scatter(-1, ids, torch.softmax(values / temperature, -1))
    labels = made.batch["labels"]
    labels[3] = ids[3, 2]  # a label that is also among the likeliest, for certain
    result = made.run(report_agreement=True)
    q = 0.6 * q + 0.4 * functional.one_hot(labels, q.shape[-1])
    expected = -(q * student).sum(-1)
    torch.testing.assert_close(result.loss.double(), expected.mean(), **TOLERANCE)
    torch.testing.assert_close(result.divergence.double(), expected + torch.xlogy(q, q).sum(-1), **TOLERANCE)
    assert result.agrees.tolist() == (made.logits().argmax(-1) == plain.argmax(-1)).float().tolist()


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_before_training_the_plain_gates_give_the_teacher(setting: Any, distill: float) -> None:
    made = setting(loss=LossOptions(top_k=0, distill=distill))
    plain = {**made.batch, "gate_hidden": torch.zeros_like(made.batch["gate_hidden"])}
    plain["gate_thought"] = torch.ones_like(plain["gate_thought"])
    result = made.run(plain, report_agreement=True)
    assert result.agrees.tolist() == [1.0] * len(result.agrees), (
        "under every objective agreement is with the plain model"
    )
    if distill:
        torch.testing.assert_close(result.divergence, torch.zeros_like(result.divergence), rtol=0, atol=2e-6)
    assert made.run().divergence.mean() > 0.05


def test_a_given_trunk_and_targets_are_used(setting: Any) -> None:
    made = setting(loss=LossOptions(top_k=6, vocab_sample=0))
    ids = made.logits(plain=True).topk(6, dim=-1)[1]
    logs = torch.log_softmax(made.logits(plain=True), -1).gather(-1, ids).float()
    computed = made.run()
    given = made.run({**made.batch, "target_ids": ids, "target_log_probs": logs})
    torch.testing.assert_close(computed.loss, given.loss, **TOLERANCE)
    other = made.run({**made.batch, "target_ids": ids.flip(-1), "target_log_probs": logs})
    assert abs(float((other.loss - given.loss).detach())) > 1e-3
    zero = made.run({**made.batch, "trunk": torch.zeros(made.batch["input_ids"].shape[0], 64, dtype=torch.bfloat16)})
    assert abs(float((zero.loss - given.loss).detach())) > 1e-3


def test_stored_targets_do_not_narrow_the_whole_vocabulary(setting: Any) -> None:
    made = setting(loss=LossOptions(top_k=0))
    ids = made.logits(plain=True).topk(1, dim=-1)[1]
    batch = {**made.batch, "target_ids": ids, "target_log_probs": torch.zeros(ids.shape)}
    torch.testing.assert_close(made.run(batch).loss, made.run().loss)


def names(student: Student) -> set[str]:
    return {name for name, value in student.named_parameters() if value.requires_grad}


LAYER = {
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}


@pytest.mark.parametrize(
    ("options", "layers", "others"),
    [
        ({"trained": "late"}, (3, 4), {"norm.weight"}),
        ({"trained": "full"}, (0, 1, 2, 3, 4), {"norm.weight"}),
        ({"trained": "full", "last_layers": 3}, (2, 3, 4), {"norm.weight"}),
        (
            {"trained": "full", "last_layers": 3, "train_embedding": True},
            (2, 3, 4),
            {"norm.weight", "embed_tokens.weight"},
        ),
        ({"trained": "late", "train_embedding": True}, (3, 4), {"norm.weight", "embed_tokens.weight"}),
    ],
)
def test_what_trains(setting: Any, options: dict[str, Any], layers: tuple[int, ...], others: set[str]) -> None:
    made = setting(**options)
    expected = {f"layers.{layer}.{name}" for layer in layers for name in LAYER} | others
    assert names(made.student) == {f"model.model.{name}" for name in expected}


@pytest.mark.parametrize(("last_layers", "layers"), [(2, (3, 4)), (4, (1, 2, 3, 4)), (None, (0, 1, 2, 3, 4))])
def test_what_trains_of_a_lora(setting: Any, last_layers: int | None, layers: tuple[int, ...]) -> None:
    made = setting(trained="lora", last_layers=last_layers, lora_rank=4)
    found = names(made.student)
    assert {name.split("layers.")[1].split(".")[0] for name in found} == {str(layer) for layer in layers}
    assert len(found) == len(layers) * 7 * 2 and all(".lora_A." in name or ".lora_B." in name for name in found)


def test_an_untied_head_trains_with_the_embedding(checkpoints: dict[str, Path]) -> None:
    with opened(checkpoints["llama"], decoding_layers=2, cycle_length=3) as (checkpoint, _):
        made = Setting(checkpoint, spec_of(thinking=3), trained="full", train_embedding=True)
        assert {"model.lm_head.weight", "model.model.embed_tokens.weight"} < names(made.student)


@pytest.mark.parametrize(
    "options", [{"trained": "late"}, {"trained": "lora", "lora_rank": 4}, {"trained": "late", "train_embedding": True}]
)
def test_frozen_weights_are_the_bases_own_memory_and_never_change(setting: Any, options: dict[str, Any]) -> None:
    made = setting(**options, loss=LossOptions(top_k=4, vocab_sample=0))
    before = {name: value.clone() for name, value in made.base.state_dict().items()}
    places = {value.data_ptr() for value in made.base.state_dict().values()}
    frozen = [value for value in made.student.parameters() if not value.requires_grad]
    assert frozen and all(value.data_ptr() in places for value in frozen)
    trained = [value for value in made.student.parameters() if value.requires_grad]
    assert not any(value.data_ptr() in places for value in trained)
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    first = made.run().loss
    for _ in range(3):
        optimiser.zero_grad()
        made.run().loss.backward()
        assert any(bool(value.grad.any()) for value in trained if value.grad is not None)
        optimiser.step()
    assert made.run().loss < first
    for name, value in made.base.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("encoding", [0, 1])
@pytest.mark.parametrize("trained", TRAINED)
def test_gradients_are_those_of_the_reference(setting: Any, trained: str, encoding: int) -> None:
    """Autograd through the plain reference, document by document, with its own loss."""
    split = spec_of(encoding=encoding, thinking=3 - encoding)
    made = setting(split, **TRAINED[trained], loss=LossOptions(distill=0))
    made.run().loss.backward()
    total = len(made.batch["labels"])
    for document, start in zip(made.documents, made.batch["starts"].tolist()[:-1], strict=True):
        end = start + len(document.token_ids)
        run = made.reference(
            torch.from_numpy(document.token_ids)[None],
            torch.arange(end - start)[None],
            made.batch["gate_hidden"][None, start:end],
            made.batch["gate_thought"][None, start:end],
        )
        inside = (made.batch["loss_rows"] >= start) & (made.batch["loss_rows"] < end)
        logits = run.logits[0, made.batch["loss_rows"][inside] - start]
        (functional.cross_entropy(logits, made.batch["labels"][inside], reduction="sum") / total).backward()
    expected = dict(made.reference.named_parameters())
    checked = 0
    for name, value in made.student.named_parameters():
        if not value.requires_grad or "lora_A" in name:  # B is 0 before training, and so is A's gradient
            continue
        if "lora_B" in name:  # W = W0 + s B A: the gradient of B is s (dL/dW) A^T
            module = name.removeprefix("model.base_model.model.").replace(".lora_B.default.weight", "")
            factor = dict(made.student.named_parameters())[name.replace("lora_B", "lora_A")]
            wanted = 2.0 * expected[f"{module}.weight"].grad @ factor.detach().t()
        else:
            wanted = expected[name.removeprefix("model.")].grad
        torch.testing.assert_close(value.grad, wanted, rtol=2e-4, atol=1e-6)
        checked += 1
    assert checked >= 20


@pytest.mark.parametrize("trained", ["late", "full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(setting: Any, trained: str) -> None:
    found = []
    for used in (False, True):
        torch.manual_seed(0)  # of a lora's first factors
        made = setting(trained=trained, gradient_checkpointing=used, loss=LossOptions(top_k=4, vocab_sample=0))
        made.run().loss.backward()
        found.append({name: value.grad for name, value in made.student.named_parameters() if value.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-6, atol=1e-8, msg=name)


class Trained:
    """A student of all layers, and what its loss and gradients were before something else computes them."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.loss, self.gradients = self.run()

    def run(self) -> tuple[Tensor, list[Tensor]]:
        self.made.student.zero_grad()
        result = self.made.run()
        result.loss.backward()
        return result.label_loss, [p.grad.clone() for p in self.made.student.parameters() if p.grad is not None]

    def assert_same(self) -> None:
        loss, gradients = self.run()
        torch.testing.assert_close(loss, self.loss, **TOLERANCE)
        for found, expected in zip(gradients, self.gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


@pytest.fixture
def all_layers(setting: Any) -> Trained:
    return Trained(setting(trained="full", loss=LossOptions(distill=0)))


def test_the_padded_view_of_a_gpu_gives_the_same(all_layers: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_view(config: Any, starts: Any, positions: Tensor, dtype: torch.dtype) -> packed.Layout:
        padded, kept = packed._padded_view(starts, positions.device)
        assert padded.shape == (4, 14) and kept.shape == positions.shape
        return replace(packed.make_layout(config, starts, positions, dtype), padded=padded, kept=kept)

    monkeypatch.setattr("dmtd_models.finetune.student.make_layout", with_view)
    all_layers.assert_same()


def test_held_out_divergences_compare_across_objectives(setting: Any) -> None:
    objectives = (LossOptions(distill=0), LossOptions(top_k=0), LossOptions(top_k=3, distill=0.4, temperature=2.0))
    results = [setting(loss=loss).run(report_agreement=True, comparable=True).divergence for loss in objectives]
    made = setting()
    plain, student = made.logits(plain=True), made.logits()
    teacher, ids = plain.topk(32, dim=-1)
    log_q = torch.log_softmax(teacher, -1)
    expected = (log_q.exp() * (log_q - torch.log_softmax(student, -1).gather(-1, ids))).sum(-1)
    for found in results:
        torch.testing.assert_close(found, expected.float(), **TOLERANCE)


@pytest.mark.parametrize("block", [1, 4, 5])
def test_blocks_of_queries_give_the_same(all_layers: Trained, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(packed, "_QUERY_BLOCK", block)
    all_layers.assert_same()


def test_of_several_likeliest_tokens_the_lowest_comes_first() -> None:
    head = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    head[[70, 33, 9]] = head[(rows @ head.t()).argmax(-1)[0]].clone()
    logits = rows @ head.t()
    ids, logs = likeliest_tokens(rows, head, 5, 3)
    assert ids[:, 0].tolist() == logits.argmax(-1).tolist()
    assert {9, 33, 70} < set(ids[0].tolist()) and all(len(set(row)) == 5 for row in ids.tolist())
    torch.testing.assert_close(logs, torch.log_softmax(logits, -1).gather(-1, ids), rtol=1e-5, atol=1e-6)


def test_a_document_is_blind_to_its_neighbours(setting: Any) -> None:
    made = setting()
    first = made.run().label_loss
    changed = made.batch["input_ids"].clone()
    changed[:9] = (changed[:9] + 1) % 128
    made.batch["input_ids"] = changed
    other = made.run().label_loss
    rows = int((made.batch["loss_rows"] < 9).sum())
    assert not torch.allclose(first[:rows], other[:rows])
    assert torch.equal(first[rows:], other[rows:])
