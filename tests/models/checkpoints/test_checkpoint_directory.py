"""Hugging Face directories: what is read, what is refused, and that no torch is needed for it."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.errors import CheckpointError
from dmtd_models.reference.testing import write_tiny_checkpoint

ORIGINAL = {"num_encoding_layers": 1, "num_thinking_layers": 2, "num_decoding_layers": 1, "mtp_horizon": 4}
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture
def directory(tmp_path):
    return write_tiny_checkpoint(tmp_path / "model", family="qwen3", layers=2)


def edit_json(file, **changes):
    value = json.loads(file.read_text())
    value.update(changes)
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def edit_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = {name: np.array(array) for name, array in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_bit_for_bit(tmp_path, dtype, shards):
    path = write_tiny_checkpoint(tmp_path, family="llama", dtype=dtype, shards=shards, layers=2)
    stored = {}
    for file in path.glob("*.safetensors"):
        stored |= load_file(file)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.path == path
        assert checkpoint.config.dtype == dtype
        assert set(checkpoint.names()) == set(stored)
        assert (checkpoint.names()[0], checkpoint.names()[-1]) == ("model.embed_tokens.weight", "lm_head.weight")
        for name in checkpoint.names():
            array = checkpoint.read(name)
            assert array.dtype == DTYPES[dtype]
            assert array.shape == checkpoint.shape(name)
            assert array.tobytes() == stored[name].tobytes()
        with pytest.raises(CheckpointError, match="no tensor named"):
            checkpoint.read("model.layers.9.mlp.up_proj.weight")


def test_tensors_are_mapped_not_copied(directory):
    array = open_checkpoint(directory).read("model.embed_tokens.weight")
    base = array
    while not isinstance(base, np.memmap) and base.base is not None:
        base = base.base
    assert isinstance(base, np.memmap)
    assert not array.flags.writeable


def test_dmtd_fields_come_along(tmp_path):
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, family="qwen3", dmtd=ORIGINAL))
    assert checkpoint.dmtd is not None
    assert (checkpoint.dmtd.encoding_layers, checkpoint.dmtd.thinking_layers, checkpoint.dmtd.decoding_layers) == (
        1,
        2,
        1,
    )
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mtpqwen3"
    assert open_checkpoint(write_tiny_checkpoint(tmp_path, family="llama")).dmtd is None


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    files = [
        write_tiny_checkpoint(tmp_path / name, seed=seed) / "model.safetensors"
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_assets_and_chat_template(tmp_path):
    path = write_tiny_checkpoint(tmp_path, tokenizer=True)
    (path / "generation_config.json").write_text("{}")
    checkpoint = open_checkpoint(path)
    assets = checkpoint.assets()
    assert set(assets) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "chat_template.jinja",
    }
    assert assets["config.json"] == (path / "config.json").read_bytes()
    assert assets["chat_template.jinja"].decode().startswith("{% for message in messages %}")
    assert checkpoint.tokenizer_problem is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    edit_json(path / "tokenizer_config.json", chat_template=several)
    assert open_checkpoint(path).assets()["chat_template.jinja"] == b"D"
    (path / "chat_template.jinja").write_text("own file")
    assert open_checkpoint(path).assets()["chat_template.jinja"] == b"own file"


def test_without_a_tokenizer_there_is_a_reason(directory):
    checkpoint = open_checkpoint(directory)
    assert "tokenizer.json" in checkpoint.tokenizer_problem
    assert set(checkpoint.assets()) == {"config.json"}


def test_dtype_of_the_weights_where_the_config_does_not_say(tmp_path):
    path = write_tiny_checkpoint(tmp_path, dtype="bfloat16")
    edit_json(path / "config.json", torch_dtype=...)
    assert open_checkpoint(path).config.dtype == "bfloat16"


def test_rotary_buffers_are_ignored(directory):
    edit_tensors(
        directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    )
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in open_checkpoint(directory).names()


def test_a_stored_head_of_a_tied_model(tmp_path):
    path = write_tiny_checkpoint(tmp_path, tie=True)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "lm_head.weight" not in open_checkpoint(path).names()

    def change_one(tensors):
        tensors["lm_head.weight"][100, 3] += 1

    edit_tensors(path, change_one)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        open_checkpoint(path)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def misdeclare(directory):
    """Header says F8_E4M3, of which there is one byte a value."""
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


BROKEN = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "pickle only": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "convert them to safetensors",
    ),
    "empty file": (lambda d: cut(d / "model.safetensors", 0), "truncated"),
    "header cut": (lambda d: cut(d / "model.safetensors", 100), "truncated"),
    "data cut": (lambda d: cut(d / "model.safetensors", -1), "truncated: got"),
    "header is not JSON": (
        lambda d: (d / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"notjson!" + bytes(64)),
        "not JSON",
    ),
    "tensor missing": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "model.layers.1.mlp.up_proj.weight is missing",
    ),
    "tensor left over": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(1, np.float32)})),
        "model.layers.2.mlp.up_proj.weight is not part",
    ),
    "bias left over": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(1, np.float32)})),
        "model.layers.0.self_attn.q_proj.bias is not part",
    ),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)})),
        "got shape [63], expected [64]",
    ),
    "integer tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": np.ones(64, np.int32)})),
        "got type I32",
    ),
    "float8 tensor": (misdeclare, "got type F8_E4M3"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_directories(directory, name):
    harm, message = BROKEN[name]
    open_checkpoint(directory)
    harm(directory)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


INDEX = "model.safetensors.index.json"
BROKEN_SHARDS = {
    "shard missing": (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "shard model-00002"),
    "shard cut": (lambda d: cut(d / "model-00001-of-00002.safetensors", -4), "truncated"),
    "index without map": (lambda d: (d / INDEX).write_text("{}"), "weight_map"),
    "path leaves the directory": (
        lambda d: edit_json(d / INDEX, weight_map={"model.norm.weight": "../other/model.safetensors"}),
        "leaves the directory",
    ),
    "absolute path": (lambda d: edit_json(d / INDEX, weight_map={"model.norm.weight": "/etc/hosts"}), "leaves the"),
    "tensor elsewhere": (
        lambda d: edit_json(
            d / INDEX,
            weight_map=json.loads((d / INDEX).read_text())["weight_map"]
            | {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"},
        ),
        "as the index says",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN_SHARDS))
def test_broken_shards(tmp_path, name):
    path = write_tiny_checkpoint(tmp_path, shards=2, layers=2)
    harm, message = BROKEN_SHARDS[name]
    harm(path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "no such file"),
        ("model.bin", b"x" * 40, "pickle"),
        ("model.safetensors", b"x" * 40, "give its directory"),
        ("notes.txt", b"hello", "not GGUF"),
    ],
)
def test_other_paths(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / name)


def test_a_directory_with_only_a_gguf_file_names_it(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        open_checkpoint(tmp_path)


def test_reading_needs_neither_torch_nor_transformers_nor_onnx(tmp_path):
    path = write_tiny_checkpoint(tmp_path, family="qwen3", dtype="bfloat16", tokenizer=True)
    code = f"""
import sys
for name in ("torch", "transformers", "onnx", "dmtd_export", "dmtd_runtime"):
    sys.modules[name] = None
from pathlib import Path
from dmtd_models.checkpoints import checkpoint
from dmtd_models.config import model as config
from dmtd_models.config import families
from dmtd_models.checkpoints import gguf as gguf_checkpoint
from dmtd_models.checkpoints import gguf_tokenizer
from dmtd_models.reference import rope
from study import smollm2
from dmtd_models.checkpoints import tensors
from dmtd_models.reference import testing
opened = checkpoint.open_checkpoint(Path({str(path)!r}))
spec = config.resolve_dmtd(opened.config, None, config.SplitOptions(decoding_layers=1, cycle_length=4))
print(spec.thinking_layers, len(opened.names()), rope.rotary_tables(opened.config.rope, 16, 4)[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == ["3", "47", "(4,", "8)"]
