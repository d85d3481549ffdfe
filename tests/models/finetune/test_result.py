"""What a run leaves: a checkpoint that every reader takes, transformers' plain classes among them."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import CONVENTIONS, opened, spec_of
from safetensors import safe_open

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.errors import ModelError
from dmtd_models.finetune import result
from dmtd_models.finetune.options import TrainOptions
from dmtd_models.finetune.result import save_adapter, save_checkpoint
from dmtd_models.finetune.run import _student
from dmtd_models.finetune.student import Student
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import teacher_forced
from dmtd_models.reference.testing import write_tiny_checkpoint

TYPES = {"qwen3": "mtpqwen3", "llama": "mtpllama", "qwen2": "mtpqwen2"}
TOKENS = [5, 9, 2, 77, 31, 8]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    """Makes (checkpoint, spec, student with random changes to what it trains)."""
    stack = []

    def make(family: str = "qwen3", convention: tuple[str, str] = CONVENTIONS[1], **options: Any) -> Any:
        given = {name: options.pop(name) for name in ("dtype", "tie", "shards") if name in options}
        directory = write_tiny_checkpoint(tmp_path / "base", family=family, tokenizer=True, seed=2, **given)
        context = opened(directory, decoding_layers=2, cycle_length=3)
        checkpoint, _ = context.__enter__()
        stack.append(context)
        spec = spec_of(convention, encoding=1, thinking=1)
        base = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, torch.float32).requires_grad_(False)
        student = _student(checkpoint, base, TrainOptions(**{"precision": "float32", "lora_rank": 3, **options}))
        disturb(student)
        return checkpoint, spec, student

    yield make
    for context in stack:
        context.__exit__(None, None, None)


def disturb(student: Student, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    for value in student.parameters():
        if value.requires_grad:
            value.data += 0.05 * torch.randn(value.shape, generator=random)


@pytest.mark.parametrize("convention", CONVENTIONS, ids="+".join)
@pytest.mark.parametrize("family", TYPES)
def test_the_configuration_is_the_published_one(
    made: Any, tmp_path: Path, family: str, convention: tuple[str, str]
) -> None:
    checkpoint, spec, student = made(family, convention)
    save_checkpoint(checkpoint, spec, student, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == TYPES[family]
    fields = ("num_encoding_layers", "num_thinking_layers", "num_decoding_layers", "mtp_horizon")
    assert [raw[field] for field in fields] == [1, 1, 2, 3]
    assert (raw["cycle_origin"], raw["prompt_input"]) == convention
    with open_checkpoint(tmp_path / "out") as read:
        assert read.dmtd is not None and read.dmtd.trained and read.dmtd.convention_recorded
        assert (read.dmtd.cycle_origin, read.dmtd.prompt_input, read.dmtd.cycle_length) == (*convention, 3)
        assert read.config == checkpoint.config
        assert read.names() == checkpoint.names()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", ["late", "full"])
def test_trained_weights_are_stored_and_others_are_the_bases(
    made: Any, tmp_path: Path, trained: str, dtype: str
) -> None:
    checkpoint, spec, student = made(trained=trained, dtype=dtype, tie=True)
    save_checkpoint(checkpoint, spec, student, tmp_path / "out")
    stored = getattr(torch, dtype)
    own = dict(student.model.named_parameters())
    changed = 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        assert sorted(handle.keys()) == sorted(checkpoint.names())
        for name in checkpoint.names():
            found = handle.get_tensor(name)
            assert found.dtype == stored
            assert torch.equal(found, own[name].detach().to(stored)), name
            changed += not np.array_equal(found.float().numpy(), np.asarray(checkpoint.read(name), np.float32))
    assert changed == {"late": 2 * 11 + 1, "full": 4 * 11 + 1}[trained]


@pytest.mark.parametrize("family", TYPES)
def test_plain_transformers_classes_load_it(made: Any, tmp_path: Path, family: str) -> None:
    import transformers

    checkpoint, spec, student = made(family, trained="full")
    out = tmp_path / "out"
    save_checkpoint(checkpoint, spec, student, out)
    raw = json.loads((out / "config.json").read_text())
    raw |= {"model_type": family, "architectures": [raw["architectures"][0].removeprefix("MTP")]}
    (out / "config.json").write_text(json.dumps(raw))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        found = model(torch.tensor([TOKENS])).logits[0]
    own = DmtdModel(checkpoint.config, spec)
    own.load_state_dict({name: value.detach() for name, value in student.model.named_parameters()})
    torch.testing.assert_close(found, teacher_forced(own, TOKENS, len(TOKENS), plain=True), rtol=2e-5, atol=2e-5)


def test_a_lora_is_merged_as_peft_merges_it(made: Any, tmp_path: Path) -> None:
    checkpoint, spec, student = made(trained="lora")
    save_checkpoint(checkpoint, spec, student, tmp_path / "out")
    merged = dict(student.model.merge_and_unload().named_parameters())
    changed = 0
    with open_checkpoint(tmp_path / "out") as read:
        for name in read.names():
            found = torch.from_numpy(np.array(read.read(name)))
            torch.testing.assert_close(found, merged[name].detach(), rtol=1e-6, atol=1e-6)
            changed += not np.array_equal(found.numpy(), np.asarray(checkpoint.read(name)))
    assert changed == 4 * 7


def test_a_lora_trained_in_bfloat16_is_merged_into_the_weights_of_the_base(made: Any, tmp_path: Path) -> None:
    """Its frozen matrices are cut to bfloat16 while it is trained; nothing of that may reach the checkpoint."""
    checkpoint, spec, student = made(trained="lora", precision="bfloat16")
    for module in student.model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.to(torch.bfloat16)
    save_checkpoint(checkpoint, spec, student, tmp_path / "out")
    save_adapter(checkpoint, spec, student, tmp_path / "adapter")
    with open_checkpoint(tmp_path / "out") as read, open_checkpoint(tmp_path / "base", tmp_path / "adapter") as adapted:
        for name in read.names():
            np.testing.assert_allclose(read.read(name), adapted.read(name), rtol=1e-6, atol=1e-6)


def test_many_shards_read_back(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, spec, student = made()
    monkeypatch.setattr(result, "_SHARD_BYTES", 100_000)
    save_checkpoint(checkpoint, spec, student, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    with open_checkpoint(tmp_path / "out") as read:
        norm = student.get_parameter("model.model.norm.weight").detach().numpy()
        assert np.array_equal(np.asarray(read.read("model.norm.weight")), norm)


def test_files_follow_the_umask_and_nothing_is_left_beside_them(made: Any, tmp_path: Path) -> None:
    checkpoint, spec, student = made()
    old = os.umask(0o027)
    try:
        save_checkpoint(checkpoint, spec, student, tmp_path / "out")
        save_adapter(checkpoint, spec, student, tmp_path / "out")
    finally:
        os.umask(old)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(files) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(files.values()) == {0o640}


@pytest.mark.parametrize("save", [save_checkpoint, save_adapter])
def test_a_full_disk_leaves_what_stood_there(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any
) -> None:
    import safetensors.numpy
    import safetensors.torch

    checkpoint, spec, student = made()
    save(checkpoint, spec, student, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    disturb(student, seed=1)

    def full(tensors: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"some of it")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(result, "save_file", full)
    monkeypatch.setattr("dmtd_models.checkpoints.adapter.save_file", full)
    with pytest.raises(ModelError, match=r"cannot be written .*No space left.*make room") as error:
        save(checkpoint, spec, student, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_real_full_disk(made: Any, tmp_path: Path) -> None:
    import subprocess

    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        checkpoint, spec, student = made()
        with pytest.raises(ModelError, match="cannot be written"):
            save_checkpoint(checkpoint, spec, student, place / "out")
        assert list((place / "out").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
