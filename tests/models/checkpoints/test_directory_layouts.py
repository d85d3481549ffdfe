"""Layouts of checkpoint directories against transformers: the same weights, or one line of refusal.

A layout is drawn from what saving twice, merging, linking and copying leave behind. Two sets of weights, of different
seeds, tell which files were read.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.errors import CheckpointError
from dmtd_models.reference.testing import write_tiny_checkpoint

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
QUICK = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What stands in a directory. ``single`` and ``shards`` are weights of different seeds."""

    tie: bool
    single: str  # none, plain, save_model, with_head (of a tied model)
    shards: str  # none, whole, stale (no shard left), partial, index_of_single
    pickle: bool
    adapter: bool
    links: str  # none, soft, hard


def every_layout() -> Iterator[Layout]:
    for tie, single, shards, pickle, adapter, links in itertools.product(
        (False, True),
        ("none", "plain", "save_model", "with_head"),
        ("none", "whole", "stale", "partial", "index_of_single"),
        (False, True),
        (False, True),
        ("none", "soft", "hard"),
    ):
        if (single in ("none", "plain") or tie) and not (single == "none" and shards == "index_of_single"):
            yield Layout(tie=tie, single=single, shards=shards, pickle=pickle, adapter=adapter, links=links)


def sound() -> list[Layout]:
    """Those that have one reading, which must load."""
    return [
        each
        for each in every_layout()
        if not each.adapter
        and (
            each.shards in ("none", "stale", "partial", "index_of_single")
            if each.single != "none"
            else each.shards == "whole"
        )
    ]


def make(place: Path, layout: Layout) -> Path:
    model = write_tiny_checkpoint(place / "model", layers=2, tie=layout.tie, seed=1)
    if layout.shards in ("whole", "stale", "partial"):
        write_tiny_checkpoint(place / "other", layers=2, tie=layout.tie, seed=2, shards=2)
        for file in (place / "other").glob("model*"):
            shutil.copy(file, model)
        kept = {"whole": 2, "partial": 1, "stale": 0}[layout.shards]
        for shard in sorted(model.glob("model-*"))[kept:]:
            shard.unlink()
    elif layout.shards == "index_of_single":
        names = load_file(model / SINGLE)
        (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    if layout.pickle:
        torch.save({"model.norm.weight": torch.zeros(64)}, model / "pytorch_model.bin")
    if layout.single == "none":
        (model / SINGLE).unlink()
    elif layout.single == "save_model":
        save_model(
            transformers.AutoModelForCausalLM.from_pretrained(only(place, model)), str(model / SINGLE), {"format": "pt"}
        )
    elif layout.single == "with_head":
        tensors = load_file(model / SINGLE)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        save_file(tensors, model / SINGLE, {"format": "pt"})
    if layout.adapter:
        (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
        save_file(
            {"base_model.model.x.lora_A.weight": np.zeros((1, 1), np.float32)}, model / "adapter_model.safetensors"
        )
    link_all(place, model, layout.links)
    return model


def only(place: Path, model: Path) -> Path:
    """Another directory with the config and the one weights file."""
    (place / "only").mkdir()
    for name in ("config.json", SINGLE):
        shutil.copy(model / name, place / "only")
    return place / "only"


def link_all(place: Path, model: Path, kind: str) -> None:
    """Put every file elsewhere and a link in its place, as the Hub's cache does."""
    if kind == "none":
        return
    (place / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        blob = place / "blobs" / f"{number:064x}"
        file.rename(blob)
        if kind == "soft":
            file.symlink_to(os.path.relpath(blob, model))
        else:
            os.link(blob, file)


def expected_weights(model: Path) -> dict[str, np.ndarray] | None:
    """What transformers reads; None where it refuses, or makes weights up."""
    try:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    except Exception:  # its readers raise many kinds
        return None
    if info["missing_keys"] or info["mismatched_keys"]:
        return None
    return {name: tensor.numpy() for name, tensor in loaded.state_dict().items()}


def check(place: Path, layout: Layout) -> bool:
    """Whether it loads; if so, the weights are those of transformers."""
    model = make(place, layout)
    try:
        checkpoint = open_checkpoint(model)
    except CheckpointError as refused:
        told = str(refused)
        checkpoint = None
    if checkpoint is None:
        assert "\n" not in told, layout
        assert str(model) in told, layout
        return False
    expected = expected_weights(model)
    assert expected is not None, layout
    for name in checkpoint.names():
        assert np.array_equal(checkpoint.read(name), expected[name]), (layout, name)
    return True


@pytest.mark.parametrize("tie", [False, True])
def test_layouts_with_one_reading_load(tmp_path: Path, tie: bool) -> None:
    drawn = random.Random(3).sample([each for each in sound() if each.tie == tie], QUICK // 4)
    for number, layout in enumerate(drawn):
        assert check(tmp_path / str(number), layout), layout


def test_drawn_layouts_load_as_in_transformers_or_are_refused(tmp_path: Path) -> None:
    for number, layout in enumerate(random.Random(4).sample(list(every_layout()), QUICK)):
        assert check(tmp_path / str(number), layout) == (layout in sound()), layout


@pytest.mark.slow
def test_every_layout(tmp_path: Path) -> None:
    for number, layout in enumerate(every_layout()):
        assert check(tmp_path / str(number), layout) == (layout in sound()), layout


WHOLE = Layout(tie=False, single="plain", shards="whole", pickle=False, adapter=False, links="none")


def refusal(model: Path, adapter: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model, adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_whole_saves_name_both(tmp_path: Path) -> None:
    told = refusal(make(tmp_path, WHOLE))
    assert SINGLE in told
    assert INDEX in told


def test_a_stale_index_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Sharded, then whole: what save_pretrained itself leaves behind.
    model = transformers.AutoModelForCausalLM.from_pretrained(write_tiny_checkpoint(tmp_path / "a", layers=2))
    model.save_pretrained(tmp_path / "b", max_shard_size="50KB")
    model.save_pretrained(tmp_path / "b")
    assert {INDEX, SINGLE} <= {file.name for file in (tmp_path / "b").iterdir()}
    with open_checkpoint(tmp_path / "b") as checkpoint:
        expected = model.state_dict()
        assert all(np.array_equal(checkpoint.read(name), expected[name].numpy()) for name in checkpoint.names())
    assert "is not there" in caplog.text


def test_a_tensor_in_two_shards_names_both(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "m", layers=2, shards=2)
    first, second = sorted(model.glob("model-*"))
    save_file({**load_file(second), "model.embed_tokens.weight": np.zeros((128, 64), np.float32)}, second)
    told = refusal(model)
    assert first.name in told
    assert second.name in told


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks for what transformers renamed
def test_adapters_of_peft_say_what_to_do(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = write_tiny_checkpoint(tmp_path / "base", layers=2)
    wrapped = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    )
    wrapped.save_pretrained(tmp_path / "lora")
    told = refusal(tmp_path / "lora")
    assert "merge" in told
    assert "--adapter" in told
    assert "merge" in refusal(base, tmp_path / "lora")
    # And what it says to do is read as transformers reads it.
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = expected_weights(tmp_path / "merged")
    assert expected is not None
    with open_checkpoint(tmp_path / "merged") as checkpoint:
        assert all(np.array_equal(checkpoint.read(name), expected[name]) for name in checkpoint.names())


def test_an_adapter_of_finetune_in_the_place_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"dmtd_adapter": "delta"}')
    assert "with --adapter" in refusal(tmp_path)


def test_weights_of_another_name(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "m", layers=2)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert "other.safetensors" in refusal(model)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 538090408\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_pointers_of_git_lfs_are_called_so(tmp_path: Path, name: str) -> None:
    model = write_tiny_checkpoint(tmp_path / "m", layers=2, tokenizer=True)
    (model / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(model).assets()


def test_a_pointer_in_the_place_of_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text(POINTER)
    assert "git lfs pull" in refusal(tmp_path / "m.gguf")


def test_links_to_nowhere_are_called_so(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "m", layers=2)
    (model / SINGLE).unlink()
    (model / SINGLE).symlink_to("../gone")
    assert "link to ../gone" in refusal(model)
    (tmp_path / "l").symlink_to("gone")
    assert "link to gone" in refusal(tmp_path / "l")
