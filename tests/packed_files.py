"""GPTQ and AWQ checkpoints, packed number by number as AutoGPTQ and AutoAWQ pack, and their values by the formats' formula."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from dmtd_models.checkpoints.checkpoint import open_checkpoint
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

    def __init__(
        self,
        directory,
        pack,
        settings,
        *,
        bits=4,
        group=32,
        zeros="any",
        order=None,
        dtype=np.float16,
        largest_scale=0.01,
        seed=3,
    ):
        write_tiny_checkpoint(directory, family="llama", layers=2, dtype="float16", tokenizer=True)
        self.directory, self.file = directory, directory / "model.safetensors"
        tensors = load_file(self.file)
        rng = np.random.default_rng(seed)
        self.values, self.zeros = {}, {}
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
            scales = rng.uniform(largest_scale / 10, largest_scale, (outputs, groups)).astype(dtype)
            self.values[name] = scales.astype(np.float64)[:, group_of] * (codes - zero[:, group_of])
            self.zeros[name] = zero
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": a for part, a in pack(codes, zero, scales, group_of, bits).items()}
        self.write(tensors)
        self.configure(quantization_config=settings)

    def write(self, tensors):
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, self.file)

    def write_values(self, directory):
        """Make a copy of the directory an ordinary checkpoint: float32 matrices in the place of the packed ones."""
        parts = tuple(f".{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
        tensors = {name: array for name, array in load_file(self.file).items() if not name.endswith(parts)}
        tensors |= {name: values.astype(np.float32) for name, values in self.values.items()}
        save_file(tensors, directory / self.file.name)
        config = json.loads((directory / "config.json").read_text())
        del config["quantization_config"]
        (directory / "config.json").write_text(json.dumps(config))

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
