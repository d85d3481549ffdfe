"""Stored features: what the frozen layers compute, rounded as stated; gone on with, made anew, refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import documents_of, opened

from dmtd_models.errors import ModelError
from dmtd_models.finetune import features
from dmtd_models.finetune.batches import make_batch
from dmtd_models.finetune.features import FeatureKey, FeatureStore, add_computed, documents_digest, store_features
from dmtd_models.finetune.options import BatchOptions
from dmtd_models.finetune.packed import layer_forward, make_layout
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import gates
from dmtd_models.reference.testing import write_tiny_checkpoint

TOP_K = 5
LENGTHS = [(12, 3), (30, 4), (7, 2), (25, 9), (40, 1)]
TOKENS = sum(length for length, _ in LENGTHS)
FILES = {"trunk.bin", "target_ids.bin", "target_logs.bin", "features.json"}


class Stored:
    """A tiny model, documents, and calls of ``store_features`` counted by the groups of documents they compute."""

    def __init__(self, base: DmtdModel, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.root = base, directory
        self.documents = documents_of(LENGTHS, seed=8)
        self.computed: list[int] = []
        self.fail_at: int | None = None
        whole = features._compute

        def counted(model: DmtdModel, frozen: int, token_ids: torch.Tensor, *arguments: Any) -> Any:
            if self.fail_at is not None and len(self.computed) == self.fail_at:
                raise KeyboardInterrupt
            self.computed.append(len(token_ids))
            return whole(model, frozen, token_ids, *arguments)

        monkeypatch.setattr(features, "_compute", counted)

    @property
    def key(self) -> FeatureKey:
        return FeatureKey(weights="w", documents=documents_digest(self.documents), frozen_layers=2, top_k=TOP_K)

    @property
    def directory(self) -> Path:
        return self.root / self.key.name

    def store(self, key: FeatureKey | None = None) -> FeatureStore:
        self.computed.clear()
        return store_features(
            self.base,
            self.documents,
            self.root,
            key or self.key,
            row_len=40,
            autocast=nullcontext,
        )

    def batch(self, store: FeatureStore) -> dict[str, torch.Tensor]:
        order = [self.documents[index] for index in (3, 0, 4)]
        batch = make_batch(order, self.base.spec, BatchOptions(vary_phase=False), np.random.default_rng(0))
        store.add_to(batch)
        return batch


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stored]:
    directory = write_tiny_checkpoint(tmp_path / "base", seed=6)
    with opened(directory, decoding_layers=2, cycle_length=3) as (checkpoint, spec):
        base = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32).requires_grad_(False)
        yield Stored(base, tmp_path / "features", monkeypatch)


def test_stored_is_what_the_plain_model_computes(stored: Stored) -> None:
    batch = stored.batch(stored.store())
    assert stored.computed == [12, 37, 25, 40]
    assert {file.name for file in stored.directory.iterdir()} == FILES
    first = learnt = 0
    for index in (3, 0, 4):
        document = stored.documents[index]
        n = len(document.token_ids)
        gate_hidden, gate_thought = gates(stored.base.spec, prompt_len=n, total_len=n, plain=True)
        with torch.no_grad():
            run = stored.base(
                torch.from_numpy(document.token_ids)[None],
                torch.arange(n)[None],
                torch.from_numpy(gate_hidden)[None],
                torch.from_numpy(gate_thought)[None],
            )
        # bfloat16 keeps 8 bits: half a unit of the last place is 2^-9 of the value.
        torch.testing.assert_close(batch["trunk"][first : first + n].float(), run.thought[0], rtol=2**-8, atol=1e-5)
        assert not torch.equal(batch["trunk"][first : first + n].float(), run.thought[0])
        logs, ids = torch.log_softmax(run.logits[0, document.prompt_len - 1 : n - 1], -1).topk(TOP_K, dim=-1)
        rows = slice(learnt, learnt + n - document.prompt_len)
        assert batch["target_ids"][rows].tolist() == ids.tolist()
        torch.testing.assert_close(batch["target_log_probs"][rows], logs, rtol=2**-10, atol=1e-4)  # float16: 11 bits
        first, learnt = first + n, learnt + n - document.prompt_len
    assert first == len(batch["trunk"]) and learnt == len(batch["target_ids"])


def test_a_batch_used_many_times_gets_the_same(stored: Stored) -> None:
    store = stored.store()
    read, computed = stored.batch(store), stored.batch(store)
    for name in ("trunk", "target_ids", "target_log_probs"):
        del computed[name]
    add_computed(stored.base, computed, frozen_layers=2, top_k=TOP_K, autocast=nullcontext)
    assert computed.keys() == read.keys()
    assert torch.equal(computed["target_ids"], read["target_ids"])
    for name in ("trunk", "target_log_probs"):  # other documents beside them: another order of sums
        torch.testing.assert_close(computed[name].float(), read[name].float(), rtol=2**-7, atol=1e-4)


def test_a_second_run_reads_what_is_there(stored: Stored) -> None:
    one = stored.batch(stored.store())
    other = stored.batch(stored.store())
    assert stored.computed == []
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_pass_goes_on(stored: Stored) -> None:
    stored.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        stored.store()
    stored.fail_at = None
    goes_on = stored.batch(stored.store())
    assert stored.computed == [25, 40]
    shutil.rmtree(stored.directory)
    anew = stored.batch(stored.store())
    assert all(torch.equal(goes_on[name], anew[name]) for name in anew)


@pytest.mark.parametrize("field", ["weights", "documents"])
def test_features_of_another_model_or_text_stand_beside_these(stored: Stored, field: str) -> None:
    before = stored.batch(stored.store())
    stored.store(replace(stored.key, **{field: "other"}))
    assert sum(stored.computed) == TOKENS
    after = stored.batch(stored.store())
    assert stored.computed == [] and len(list(stored.root.iterdir())) == 2
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("damage", ["missing", "short", "record"])
def test_damaged_files_are_made_anew(stored: Stored, damage: str) -> None:
    expected = stored.batch(stored.store())
    if damage == "missing":
        (stored.directory / "trunk.bin").unlink()
    elif damage == "short":
        (stored.directory / "target_ids.bin").write_bytes(b"\0" * 8)
    else:
        (stored.directory / "features.json").write_text("[1, 2")
    found = stored.batch(stored.store())
    assert sum(stored.computed) == TOKENS
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_the_trunk_ends_with_the_last_frozen_layer(stored: Stored, frozen: int) -> None:
    """Targets are the same wherever it ends; where nothing is frozen there is none."""
    expected = stored.batch(stored.store())
    found = stored.batch(stored.store(replace(stored.key, frozen_layers=frozen)))
    assert sum(stored.computed) == TOKENS and ("trunk" in found) == (frozen > 0)
    assert torch.equal(found["target_ids"], expected["target_ids"])
    if frozen:
        token_ids = torch.from_numpy(stored.documents[3].token_ids)
        layout = make_layout(stored.base.config, (0, len(token_ids)), torch.arange(len(token_ids)), torch.float32)
        x = stored.base.model.embed_tokens(token_ids)
        for layer in stored.base.model.layers[:frozen]:
            x = layer_forward(layer, x, layout)
        torch.testing.assert_close(found["trunk"][: len(x)].float(), x.detach(), rtol=2**-8, atol=1e-5)


def test_too_little_room_is_said_before_anything_is_computed(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = TOKENS * (2 * 64 + 6 * TOP_K)
    usage = shutil.disk_usage(stored.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    with pytest.raises(ModelError, match=r"stored features: need 0\.0 GB in .* are free .*--cache-dir") as error:
        stored.store()
    assert "\n" not in str(error.value) and stored.computed == []
    assert list(stored.directory.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * needed))
    stored.store()
    taken = {file.name: file.stat().st_size for file in stored.directory.iterdir()}
    assert taken["trunk.bin"] + taken["target_ids.bin"] + taken["target_logs.bin"] == needed


def test_two_runs_never_write_the_same_store(stored: Stored) -> None:
    """The second would unlink the files that the first writes, whose note would then speak of those of the second."""
    whole = features._compute
    seen: list[str] = []

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(ModelError, match=r"another process is at work in .*--cache-dir") as refused:
            store_features(stored.base, stored.documents, stored.root, stored.key, row_len=40, autocast=nullcontext)
        seen.append(str(refused.value))
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_compute", meanwhile)
        one = stored.batch(stored.store())
    assert len(seen) == 4
    other = stored.batch(stored.store())  # the claim has gone, and what was computed is whole
    assert stored.computed == [] and all(torch.equal(one[name], other[name]) for name in one)
