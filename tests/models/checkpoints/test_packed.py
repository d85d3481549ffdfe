"""GPTQ and AWQ checkpoints, packed here as AutoGPTQ and AutoAWQ pack, number by number, and read by the formats' formula."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.errors import CheckpointError, ConfigError
from dmtd_models.reference.testing import write_tiny_checkpoint

NAME = "model.layers.1.mlp.down_proj"  # [64, 96]: 96 inputs are no whole groups of 64
PACKED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def gptq(codes, zeros, scales, group_of, bits, *, v2=False):
    """Codes [out, in], zero points and scales [out, groups]."""
    per_word, (outputs, inputs) = 32 // bits, codes.shape
    qweight = np.zeros((inputs // per_word, outputs), np.uint32)
    for i in range(inputs):
        qweight[i // per_word] |= codes[:, i].astype(np.uint32) << np.uint32(bits * (i % per_word))
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    qzeros = np.zeros((zeros.shape[1], outputs // per_word), np.uint32)
    for o in range(outputs):
        qzeros[:, o // per_word] |= stored[o].astype(np.uint32) << np.uint32(bits * (o % per_word))
    parts = {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": scales.T}
    return parts | {"g_idx": group_of.astype(np.int32)}


def awq(codes, zeros, scales, group_of, bits):
    del group_of
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(matrix):  # [rows, outputs]
        words = np.zeros((matrix.shape[0], matrix.shape[1] // 8), np.uint32)
        for word in range(words.shape[1]):
            for i in range(8):
                words[:, word] |= matrix[:, word * 8 + order[i]].astype(np.uint32) << np.uint32(i * bits)
        return words.view(np.int32)

    return {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T}


class Packed:
    """A tiny checkpoint whose layers are packed, and the values by the formula in Python's floats."""

    def __init__(self, directory, pack, settings, *, bits=4, group=32, zeros="any", order=None, dtype=np.float16):
        write_tiny_checkpoint(directory, family="llama", layers=2, dtype="float16", tokenizer=True)
        self.directory, self.file = directory, directory / "model.safetensors"
        tensors = load_file(self.file)
        rng = np.random.default_rng(3)
        self.values = {}
        for name in [name for name in tensors if name.split(".")[-2] in PACKED]:
            outputs, inputs = tensors.pop(name).shape
            group_of = np.arange(inputs) // (group if group > 0 else inputs)
            if order == "act":
                group_of = rng.permutation(group_of)
            groups = int(group_of.max()) + 1
            codes = rng.integers(0, 1 << bits, (outputs, inputs))
            zero = (
                rng.integers(0, 1 << bits, (outputs, groups)) if zeros == "any" else np.full((outputs, groups), zeros)
            )
            scales = rng.uniform(0.001, 0.01, (outputs, groups)).astype(dtype)
            self.values[name] = scales.astype(np.float64)[:, group_of] * (codes - zero[:, group_of])
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": a for part, a in pack(codes, zero, scales, group_of, bits).items()}
        self.write(tensors)
        self.configure(quantization_config=settings)

    def write(self, tensors):
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, self.file)

    def configure(self, **changes):
        config = json.loads((self.directory / "config.json").read_text())
        (self.directory / "config.json").write_text(json.dumps(config | changes))

    def edit(self, **changes):
        """Tensors of ``NAME`` put in the place of others; None takes one out."""
        tensors = load_file(self.file) | {f"{NAME}.{part}": array for part, array in changes.items()}
        self.write({name: array for name, array in tensors.items() if array is not None})

    def check(self, *, source, block=None):
        """Values by ``read`` and, with a block, by blocks; the products are exact in float32."""
        with open_checkpoint(self.directory) as checkpoint:
            for name, expected in self.values.items():
                np.testing.assert_array_equal(checkpoint.read(name), expected.astype(np.float32), err_msg=name)
                blocks = checkpoint.blocks(name)
                assert checkpoint.shape(name) == expected.shape
                if block is None:
                    assert blocks is None
                    assert checkpoint.block_source(name) is None
                    continue
                assert blocks.source == checkpoint.block_source(name) == source
                assert blocks.block == block
                np.testing.assert_array_equal(blocks.dequantised(), expected.astype(np.float32), err_msg=name)
            assert checkpoint.blocks("lm_head.weight") is None
            assert "quantization_config" not in json.loads(checkpoint.assets()["config.json"])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq(tmp_path, bits, v2):
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    made = Packed(tmp_path, lambda *args: gptq(*args, v2=v2), settings, bits=bits)
    made.check(source="gptq", block=32)


@pytest.mark.parametrize(("group", "block"), [(16, 16), (48, 16), (-1, 32)])
def test_groups_of_other_sizes_are_cut_into_blocks(tmp_path, group, block):
    """The last group of 48 in 64 inputs is short, as AutoGPTQ leaves it."""
    made = Packed(tmp_path, gptq, {"quant_method": "gptq", "bits": 4}, group=group)
    with open_checkpoint(made.directory) as checkpoint:
        assert checkpoint.blocks(f"{NAME}.weight").block == block
        for name, expected in made.values.items():
            np.testing.assert_array_equal(checkpoint.blocks(name).dequantised(), expected.astype(np.float32))


def test_awq(tmp_path):
    Packed(tmp_path, awq, {"quant_method": "awq", "bits": 4, "version": "GEMM"}).check(source="awq", block=32)


@pytest.mark.parametrize(("bits", "zero"), [(4, 8), (8, 128), (2, 2)])
def test_zero_points_in_the_middle_need_no_minimums(tmp_path, bits, zero):
    made = Packed(tmp_path, gptq, {"quant_method": "gptq"}, bits=bits, zeros=zero, dtype=ml_dtypes.bfloat16)
    made.check(source="gptq", block=32)
    with open_checkpoint(made.directory) as checkpoint:
        assert checkpoint.blocks(f"{NAME}.weight").minimums is None


def test_act_order_is_read_as_floats(tmp_path):
    Packed(tmp_path, gptq, {"quant_method": "gptq", "desc_act": True}, order="act").check(source=None)


def test_biases_of_zeros_are_left_out(tmp_path):
    made = Packed(tmp_path, gptq, {"quant_method": "gptq"})
    made.edit(bias=np.zeros(64, np.float16))
    made.check(source="gptq", block=32)
    made.edit(bias=np.ones(64, np.float16))
    with pytest.raises(CheckpointError, match=r"down_proj\.bias"):
        open_checkpoint(made.directory)


def test_damage_and_other_layouts(tmp_path):
    made = Packed(tmp_path, gptq, {"quant_method": "gptq"})
    whole = load_file(made.file)
    for change, words in (
        ({"qzeros": None}, r"qzeros is missing"),
        ({"scales": np.zeros((5, 64), np.float16)}, r"down_proj\.qzeros: got I32 \[3, 8\], expected I32 \[5, 8\]"),
        ({"scales": np.zeros((3, 64), np.int32)}, r"down_proj\.scales: got I32"),
        ({"qweight": np.zeros((9, 64), np.int32)}, r"qweight: got shape \[9, 64\].* 2 or 4 or 8 bits"),
        ({"g_idx": np.full(96, 3, np.int32)}, r"g_idx: names a group outside 0 to 2"),
    ):
        made.edit(**change)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(made.directory)
        made.write(whole)
    for settings, words in (
        ({"quant_method": "bitsandbytes"}, "bitsandbytes.*expected quant_method gptq or awq"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format: got 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "version: got 'gemv', expected gemm"),
        ({"bits": 4}, r"quantization_config: got \{'bits': 4\}"),
    ):
        made.configure(quantization_config=settings)
        with pytest.raises(ConfigError, match=words) as error:
            open_checkpoint(made.directory)
        assert "\n" not in str(error.value)
