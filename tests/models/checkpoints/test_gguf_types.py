"""Every GGUF tensor type that is read, against decoders written here from the block layouts, one value at a time.

The blocks are random bytes (with sane scales), so every bit pattern of the layouts is exercised; nothing here uses the
library's own quantisation but to check that sizes agree.
"""

import struct

import gguf
import numpy as np
import pytest
from gguf_files import tiny_config, write_gguf

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.reference.testing import random_weights

ROWS, COLUMNS = 256, 256  # of the tensor under test: model.layers.0.mlp.up_proj.weight


def half(data, offset):
    return struct.unpack_from("<e", data, offset)[0]


def q4_0(block):
    d, low_high = half(block, 0), block[2:18]
    return [d * ((byte & 15) - 8) for byte in low_high] + [d * ((byte >> 4) - 8) for byte in low_high]


def q4_1(block):
    d, m, packed = half(block, 0), half(block, 2), block[4:20]
    return [d * (byte & 15) + m for byte in packed] + [d * (byte >> 4) + m for byte in packed]


def five_bits(high, packed):
    bits = int.from_bytes(high, "little")
    low = [(byte & 15) | ((bits >> i & 1) << 4) for i, byte in enumerate(packed)]
    return low + [(byte >> 4) | ((bits >> (i + 16) & 1) << 4) for i, byte in enumerate(packed)]


def q5_0(block):
    return [half(block, 0) * (value - 16) for value in five_bits(block[2:6], block[6:22])]


def q5_1(block):
    return [half(block, 0) * value + half(block, 2) for value in five_bits(block[4:8], block[8:24])]


def q8_0(block):
    return [half(block, 0) * value for value in struct.unpack_from("<32b", block, 2)]


def q2_k(block):
    scales, packed, d, dmin = block[:16], block[16:80], half(block, 80), half(block, 82)
    out = []
    for part in range(2):
        for shift in range(0, 8, 2):
            for side in range(2):
                scale = scales[len(out) // 16]
                for byte in packed[part * 32 + side * 16 :][:16]:
                    out.append(d * (scale & 15) * (byte >> shift & 3) - dmin * (scale >> 4))
    return out


def q3_k(block):
    high, packed, scales, d = block[:32], block[32:96], block[96:108], half(block, 108)
    out = []
    for part in range(2):
        for step in range(4):
            for side in range(2):
                k = len(out) // 16
                low_bits = (scales[k % 8] & 15) if k < 8 else (scales[k % 8] >> 4)
                scale = (low_bits | ((scales[8 + k % 4] >> (2 * (k // 4)) & 3) << 4)) - 32
                for i in range(side * 16, side * 16 + 16):
                    value = packed[part * 32 + i] >> (2 * step) & 3
                    out.append(d * scale * (value - (0 if high[i] >> (part * 4 + step) & 1 else 4)))
    return out


def scale_and_min(scales, j):
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    low, high = scales[j + 4] & 15, scales[j + 4] >> 4
    return low | (scales[j - 4] >> 6) << 4, high | (scales[j] >> 6) << 4


def q4_k(block):
    d, dmin, scales, packed = half(block, 0), half(block, 2), block[4:16], block[16:144]
    out = []
    for j in range(8):
        scale, least = scale_and_min(scales, j)
        for byte in packed[j // 2 * 32 :][:32]:
            out.append(d * scale * (byte >> 4 if j % 2 else byte & 15) - dmin * least)
    return out


def q5_k(block):
    d, dmin, scales, high, packed = half(block, 0), half(block, 2), block[4:16], block[16:48], block[48:176]
    out = []
    for j in range(8):
        scale, least = scale_and_min(scales, j)
        for i, byte in enumerate(packed[j // 2 * 32 :][:32]):
            value = (byte >> 4 if j % 2 else byte & 15) + 16 * (high[i] >> j & 1)
            out.append(d * scale * value - dmin * least)
    return out


def q6_k(block):
    low, high, scales, d = block[:128], block[128:192], struct.unpack_from("<16b", block, 192), half(block, 208)
    out = []
    for part in range(2):
        for quarter in range(4):
            for i in range(32):
                byte = low[part * 64 + i + 32 * (quarter % 2)]
                value = (byte >> 4 if quarter >= 2 else byte & 15) | (high[part * 32 + i] >> (2 * quarter) & 3) << 4
                out.append(d * scales[part * 8 + quarter * 2 + i // 16] * (value - 32))
    return out


# type: (values in a block, bytes of a block, offsets of its half-precision scales, decoder)
TYPES = {
    "Q4_0": (32, 18, (0,), q4_0),
    "Q4_1": (32, 20, (0, 2), q4_1),
    "Q5_0": (32, 22, (0,), q5_0),
    "Q5_1": (32, 24, (0, 2), q5_1),
    "Q8_0": (32, 34, (0,), q8_0),
    "Q2_K": (256, 84, (80, 82), q2_k),
    "Q3_K": (256, 110, (108,), q3_k),
    "Q4_K": (256, 144, (0, 2), q4_k),
    "Q5_K": (256, 176, (0, 2), q5_k),
    "Q6_K": (256, 210, (208,), q6_k),
}


def random_blocks(kind, rng):
    """Bytes [ROWS, bytes of a row] of random blocks."""
    values, size, scale_offsets, _ = TYPES[kind]
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // values, size), dtype=np.uint8)
    for offset in scale_offsets:
        scales = rng.normal(0, 0.02, len(blocks)).astype("<f2")
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", list(TYPES))
def test_dequantised_values(tmp_path, kind):
    config = tiny_config("qwen3", hidden_size=COLUMNS, intermediate_size=ROWS, num_layers=1)
    raw = random_blocks(kind, np.random.default_rng(7))
    name = "model.layers.0.mlp.up_proj.weight"
    path = write_gguf(
        tmp_path / "m.gguf", config, random_weights(config, seed=1), stored={name: (raw, kind)}, quantise={}
    )
    checkpoint = open_checkpoint(path)
    got = checkpoint.read(name)
    assert got.dtype == np.float32
    assert got.shape == checkpoint.shape(name) == (ROWS, COLUMNS)
    _, size, _, decode = TYPES[kind]
    data = raw.tobytes()
    # Each value one at a time in Python: a sample of rows is enough.
    for row in (0, 1, 100, 255):
        start = row * raw.shape[1]
        blocks = [data[i : i + size] for i in range(start, start + raw.shape[1], size)]
        expected = [value for block in blocks for value in decode(block)]
        np.testing.assert_allclose(got[row], expected, rtol=2e-6, atol=1e-7)
    assert np.abs(got).max() > 0.05


@pytest.mark.parametrize("kind", list(TYPES))
def test_blocks_have_the_values_of_the_gguf_package(tmp_path, kind):
    """Bit for bit, rows of queries and keys in the model's order."""
    config = tiny_config("llama", hidden_size=COLUMNS, intermediate_size=ROWS, num_layers=1, head_dim=64)
    weights = random_weights(config, seed=1)
    names = [name for name, weight in weights.items() if weight.shape in ((ROWS, COLUMNS), (ROWS // 2, COLUMNS))]
    rng = np.random.default_rng(8)
    stored = {name: (random_blocks(kind, rng)[: weights[name].shape[0]], kind) for name in names}
    path = write_gguf(tmp_path / "m.gguf", config, weights, stored=stored)
    checkpoint = open_checkpoint(path)
    assert len(names) == 7
    for name in names:
        expected = gguf.quants.dequantize(stored[name][0], gguf.GGMLQuantizationType[kind])
        if "q_proj" in name or "k_proj" in name:
            heads = len(expected) // 64
            expected = np.concatenate(
                [[*expected[h * 64 :: 2][:32], *expected[h * 64 + 1 :: 2][:32]] for h in range(heads)]
            )
        blocks = checkpoint.blocks(name)
        assert blocks.source == checkpoint.block_source(name) == kind
        assert blocks.dequantised().tobytes() == expected.tobytes() == checkpoint.read(name).tobytes()
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert checkpoint.blocks(name) is None
        assert checkpoint.block_source(name) is None


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_float_types_keep_their_type_and_bits(tmp_path, kind, dtype):
    config = tiny_config("llama")
    weights = random_weights(config, seed=1, dtype=dtype)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, weights, quantise={2: kind}))
    assert checkpoint.config.dtype == dtype
    for name in checkpoint.names():
        array = checkpoint.read(name)
        if array.ndim == 2:
            assert array.dtype.name == dtype
            assert array.tobytes() == weights[name].tobytes()


def test_other_types_are_refused_by_name(tmp_path):
    config = tiny_config("qwen3", hidden_size=256, intermediate_size=256, num_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.IQ4_XS][1]
    raw = np.zeros((256, size), np.uint8)
    path = write_gguf(
        tmp_path / "m.gguf", config, random_weights(config, seed=1), stored={name: (raw, "IQ4_XS")}, quantise={}
    )
    with pytest.raises(ValueError, match="IQ4_XS"):
        open_checkpoint(path)


def test_a_number_of_a_type_that_nobody_knows_is_no_damage(tmp_path):
    config = tiny_config("qwen3", num_layers=1)
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config, seed=1), stored={}, quantise={})
    raw, name = bytearray(path.read_bytes()), b"blk.0.attn_norm.weight"
    place = raw.index(name) + len(name)
    rank = int.from_bytes(raw[place : place + 4], "little")
    raw[place + 4 + 8 * rank : place + 8 + 8 * rank] = (99).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"type is not known.*99"):
        open_checkpoint(path)
