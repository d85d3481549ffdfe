"""GGUF files as checkpoints: names, row order, configuration from the metadata, damage."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from gguf_files import tiny_config, write_gguf

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import Rope, SplitOptions, read_config, resolve_dmtd
from dmtd_models.errors import CheckpointError, ConfigError, ModelError
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import teacher_forced
from dmtd_models.reference.testing import random_weights

VARIANTS = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama multi-head": {"num_kv_heads": 4},
    "qwen2": {},
    "qwen3": {},
    "qwen3 wide heads": {"head_dim": 32, "tie_word_embeddings": True},
}


@pytest.fixture
def plain(tmp_path):
    """A whole file's arguments: path, config, weights."""
    config = tiny_config("llama")
    return tmp_path / "m.gguf", config, random_weights(config, seed=1)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_config_and_tensors(tmp_path, variant):
    config = tiny_config(variant.split()[0], **VARIANTS[variant])
    weights = random_weights(config, seed=4)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", config, weights)) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dmtd is None
        assert checkpoint.names() == list(weights)
        for name, expected in weights.items():
            assert checkpoint.shape(name) == expected.shape
            np.testing.assert_array_equal(checkpoint.read(name), expected, err_msg=name)
        written = json.loads(checkpoint.assets()["config.json"])
        assert read_config(written) == (config, None)


def test_logits_are_those_of_the_same_weights(tmp_path):
    config = tiny_config("llama")
    weights = random_weights(config, seed=4)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, weights))
    spec = resolve_dmtd(config, None, SplitOptions(decoding_layers=1, cycle_length=2))
    tokens = list(range(3, 23))
    got, expected = (
        teacher_forced(DmtdModel.from_reader(config, spec, read, torch.float64), tokens, 5)
        for read in (checkpoint.read, weights.__getitem__)
    )
    assert torch.equal(got, expected)


def test_head_size_and_heads_where_the_metadata_leave_them_out(plain):
    path, config, weights = plain
    write_gguf(path, dataclasses.replace(config, num_kv_heads=2), weights)
    assert open_checkpoint(path).config.head_dim == 16


YARN = Rope(theta=1e6, kind="yarn", factor=4.0, original_max_positions=128, beta_fast=32.0, beta_slow=1.0)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "none"}, Rope(theta=1e6)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, Rope(theta=1e6, kind="linear", factor=2.5)),
        ({"rope.scale_linear": 2.0}, Rope(theta=1e6, kind="linear", factor=2.0)),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.finetuned": True,
            },
            YARN,
        ),
        (
            # llama.cpp multiplies yarn's own factor, 1 + 0.1 ln 4, by the one, and overwrites the other.
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.attn_factor": 0.5,
                "rope.scaling.yarn_attn_factor": 0.8782488562869419,
            },
            dataclasses.replace(YARN, attention_factor=0.5 * (0.1 * math.log(4.0) + 1)),
        ),
    ],
)
def test_rope_scaling(tmp_path, metadata, expected):
    config = tiny_config("qwen2", rope=Rope(theta=1e6))
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config, seed=1), metadata=metadata)
    assert open_checkpoint(path).config.rope == expected


def llama3_divisors(theta, head_dim, factor, original):
    """As the converter writes them, from the published rule."""
    out = []
    for i in range(head_dim // 2):
        wave = 2 * math.pi * theta ** (2 * i / head_dim)
        if wave < original / 4:
            out.append(1.0)
        elif wave > original:
            out.append(factor)
        else:
            smooth = (original / wave - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 64)])
def test_llama3_scaling_is_recognised_in_its_divisors(tmp_path, factor, original):
    rope = Rope(
        theta=500000.0,
        kind="llama3",
        factor=factor,
        original_max_positions=original,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    config = tiny_config("llama", rope=rope, num_heads=2, num_kv_heads=1, head_dim=64)
    divisors = llama3_divisors(500000.0, 64, factor, original)
    path = write_gguf(
        tmp_path / "m.gguf", config, random_weights(config, seed=1), extra={"rope_freqs.weight": divisors}
    )
    assert open_checkpoint(path).config.rope == rope
    divisors[20] *= 1.01
    write_gguf(path, config, random_weights(config, seed=1), extra={"rope_freqs.weight": divisors})
    with pytest.raises(ConfigError, match="rope_freqs"):
        open_checkpoint(path)


def test_divisors_of_one_change_nothing(plain):
    path, config, weights = plain
    write_gguf(path, config, weights, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert open_checkpoint(path).config.rope == Rope(theta=10000.0)


def test_end_tokens_are_all_of_them(plain):
    path, config, weights = plain
    write_gguf(path, config, weights, metadata={"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.eos_token_ids == (2, 9)
    assert json.loads(checkpoint.assets()["generation_config.json"])["eos_token_id"] == [2, 9]


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"expert_count": 8}, "llama.expert_count"),
        ({"attention.sliding_window": 512}, "llama.attention.sliding_window"),
        ({"logit_scale": 0.5}, "llama.logit_scale"),
        ({"unheard_of": 1}, "llama.unheard_of"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
        ({"attention.head_count_kv": [2, 4]}, "attention.head_count_kv"),
        ({"attention.head_count_kv": 3}, "num_key_value_heads"),
        ({"split.count": 2}, "merge"),
    ],
)
def test_refused_metadata(plain, metadata, named):
    path, config, weights = plain
    write_gguf(path, config, weights, metadata=metadata)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neutral_values_of_unknown_features_pass(plain):
    path, config, weights = plain
    write_gguf(path, config, weights, metadata={"expert_count": 0, "attention.sliding_window": 0})
    assert open_checkpoint(path).config == config


def test_other_architectures(plain):
    path, config, weights = plain
    write_gguf(path, dataclasses.replace(config, family="gemma"), weights)
    with pytest.raises(ConfigError, match="gemma"):
        open_checkpoint(path)


def test_missing_left_over_and_misshapen_tensors(plain):
    path, config, weights = plain
    for change, message in (
        (lambda w: w.pop("model.layers.1.mlp.down_proj.weight"), r"blk\.1\.ffn_down\.weight is missing"),
        (lambda w: w.pop("model.embed_tokens.weight"), r"token_embd\.weight is missing"),
        (lambda w: w.update({"model.norm.weight": np.ones(63, np.float32)}), r"got shape \[63\], expected \[64\]"),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": w["lm_head.weight"]}), r"blk\.2\.ffn_up\.weight"),
    ):
        harmed = dict(weights)
        change(harmed)
        write_gguf(path, config, harmed)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


@pytest.mark.parametrize("kept", [4, 20, 200, 2000, -4])
def test_truncated_files(plain, kept):
    path, config, weights = plain
    write_gguf(path, config, weights)
    open_checkpoint(path).close()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(path)
