"""GPTQ and AWQ checkpoints are read by the formats' formula: see packed_files, which writes them."""

import ml_dtypes
import numpy as np
import pytest
from packed_files import NAME, Packed, awq, gptq
from safetensors.numpy import load_file

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.errors import CheckpointError, ConfigError


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
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, 'checkpoint_format: got "marlin"'),
        ({"quant_method": "awq", "version": "gemv"}, 'version: got "gemv", expected gemm'),
        ({"bits": 4}, r'quantization_config: got \{"bits": 4\}'),
    ):
        made.configure(quantization_config=settings)
        with pytest.raises(ConfigError, match=words) as error:
            open_checkpoint(made.directory)
        assert "\n" not in str(error.value)
