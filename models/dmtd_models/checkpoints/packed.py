"""Matrices of GPTQ and AWQ checkpoints, in Hugging Face's form: integers packed in int32, scales and zero points a group.

Stands under ``hf``. A matrix ``NAME.weight`` [out, in] is stored as NAME.qweight, NAME.qzeros, NAME.scales [groups, out] (and
NAME.g_idx, the group of each input, in GPTQ); its values are ``scale * (code - zero point)``.

- gptq: qweight [in x bits / 32, out], an int32 holds neighbouring inputs, the first in its lowest bits; qzeros
  [groups, out x bits / 32], one less than the zero point, modulo 2 ** bits (in ``gptq_v2`` the zero point itself);
- awq (``gemm``): qweight [in, out / 8] and qzeros [groups, out / 8], an int32 holds 8 neighbouring outputs, in the order
  0 2 4 6 1 3 5 7 from its lowest bits.

Other layouts (marlin, gemv), 3 bits and codes wider than 8 are refused. Groups of an input order of their own (GPTQ's
act-order) are read as floats, exactly: they are no blocks along the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmtd_errors.words import shown
from dmtd_models.checkpoints.blocks import BLOCK_SIZES, BlockWeight
from dmtd_models.checkpoints.safetensors_file import FLOAT_TYPES, StoredTensor, map_tensor
from dmtd_models.errors import CheckpointError, ConfigError

CONFIG_KEY = "quantization_config"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GPTQ_BITS, _AWQ_BITS = (2, 4, 8), (4,)

Codes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """What config.json says of the packed matrices: ``method`` gptq or awq, and how its integers lie."""

    method: str
    layout: str


def packed_format(raw: Mapping[str, object]) -> PackedFormat | None:
    """Read ``quantization_config``; None where there is none.

    Raises:
        ConfigError: another method, or a layout of one that is not read.
    """
    found = raw.get(CONFIG_KEY)
    if found in (None, {}):
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or method not in _LAYOUTS:
        raise ConfigError(
            f"{CONFIG_KEY}: got {shown(found)}, expected quant_method {' or '.join(_LAYOUTS)}; use the unquantised checkpoint"
        )
    layouts = _LAYOUTS[method]
    key = next((key for key in ("checkpoint_format", "format", "version") if found.get(key) is not None), None)
    layout = layouts[0] if key is None else str(found[key]).lower()
    if layout not in layouts:
        raise ConfigError(
            f"{CONFIG_KEY}: {key}: got {shown(found[key or ''])}, expected {' or '.join(layouts)}; save the "
            "checkpoint in that layout"
        )
    return PackedFormat(method=method, layout=layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """One matrix's parts in the files, checked against its shape [out, in]."""

    format: PackedFormat
    shape: tuple[int, int]
    bits: int
    parts: Mapping[str, StoredTensor]

    def blocks(self) -> BlockWeight | None:
        """The matrix in blocks, the largest that lie within groups; None where no block's inputs are of one group."""
        if (block := self.block) is None:
            return None
        codes, scales, zeros = self._unpacked()
        group_of_block = self._group_of_inputs()[::block]
        scales, zeros = scales[:, group_of_block], zeros[:, group_of_block]
        container, middle = max(self.bits, 4), 1 << self.bits - 1
        symmetric = bool((zeros == middle).all())
        if symmetric:
            codes = codes + np.uint8((1 << container - 1) - middle)
        return BlockWeight(
            codes=codes,
            bits=container,
            block=block,
            scales=scales,
            minimums=None if symmetric else -scales * zeros,
            levels=1 << (container if symmetric else self.bits),
            source=self.format.method,
        )

    def values(self) -> Float32:
        """The matrix in float32 [out, in]."""
        if (blocks := self.blocks()) is not None:
            return blocks.dequantised()
        codes, scales, zeros = self._unpacked()
        group = self._group_of_inputs()
        return scales[:, group] * (codes.astype(np.float32) - zeros[:, group])

    @property
    def block(self) -> int | None:
        """Inputs of the blocks that ``blocks`` gives."""
        group = self._group_of_inputs()
        for size in reversed(BLOCK_SIZES):
            if len(group) % size == 0 and (group.reshape(-1, size) == group[::size, None]).all():
                return size
        return None

    def _group_of_inputs(self) -> npt.NDArray[np.int64]:
        groups, inputs = self.parts["scales"].shape[0], self.shape[1]
        if "g_idx" not in self.parts:
            return np.arange(inputs) // (inputs // groups)
        return np.asarray(map_tensor(self.parts["g_idx"]), dtype=np.int64)

    def _unpacked(self) -> tuple[Codes, Float32, Float32]:
        """Codes uint8 [out, in], scales and zero points float32 [out, groups]."""
        scales = np.asarray(map_tensor(self.parts["scales"]), dtype=np.float32).T
        packed, packed_zeros = (map_tensor(self.parts[part]).view(np.uint32) for part in ("qweight", "qzeros"))
        if self.format.method == "awq":
            codes, zeros = (_unpack(words, 4)[..., list(_AWQ_PLACES)] for words in (packed, packed_zeros))
            return _transposed(codes), np.ascontiguousarray(scales), _transposed(zeros).astype(np.float32)
        codes = _unpack(packed.T, self.bits)
        zeros = _transposed(_unpack(packed_zeros, self.bits))
        if self.format.layout == "gptq":
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
        return codes.reshape(self.shape), np.ascontiguousarray(scales), zeros.astype(np.float32)


_AWQ_PLACES = tuple(_AWQ_ORDER.index(output) for output in range(8))  # where in an int32 an output's code stands


def _unpack(words: npt.NDArray[np.uint32], bits: int) -> Codes:
    """[..., words] to uint8 [..., words, codes in a word], from the lowest bits on."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (np.ascontiguousarray(words)[..., None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8)


def _transposed(codes: Codes) -> Codes:
    """uint8 [rows, words, codes in a word] to [words x codes, rows]."""
    return np.ascontiguousarray(codes.reshape(codes.shape[0], -1).T)


def take_packed(
    path: Path, fmt: PackedFormat, shapes: Mapping[str, tuple[int, ...]], stored: dict[str, StoredTensor]
) -> dict[str, PackedMatrix]:
    """The matrices of ``shapes`` that are packed, by name; their parts, and biases of zeros beside them, leave ``stored``.

    Raises:
        CheckpointError: parts that are missing, or do not fit the shape or each other.
    """
    found = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if name in stored or len(shape) != 2 or f"{module}.qweight" not in stored:
            continue
        found[name] = _packed_matrix(path, fmt, name, (shape[0], shape[1]), stored)
        for part in found[name].parts:
            del stored[f"{module}.{part}"]
        bias = f"{module}.bias"  # old packers give every matrix one
        if bias not in shapes and bias in stored and not map_tensor(stored[bias]).any():
            del stored[bias]
    return found


def _packed_matrix(
    path: Path, fmt: PackedFormat, name: str, shape: tuple[int, int], stored: Mapping[str, StoredTensor]
) -> PackedMatrix:
    module = name.removesuffix(".weight")
    parts = {part: stored[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in stored}
    if missing := [part for part in _PARTS[:3] if part not in parts]:
        raise CheckpointError(f"{path}: tensor {module}.{missing[0]} is missing beside its qweight; download it again")
    out_size, in_size = shape
    bits = _bits(path, fmt, module, parts["qweight"].shape, out_size, in_size)
    groups = parts["scales"].shape[0] if parts["scales"].shape else 0
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "qweight": (parts["qweight"].shape, ("I32",)),
        "qzeros": ((groups, out_size * bits // 32), ("I32",)),
        "scales": ((groups, out_size), tuple(FLOAT_TYPES)),
        "g_idx": ((in_size,), ("I32",)),
    }
    for part, tensor in parts.items():
        size, dtypes = expected[part]
        if tensor.shape != size or tensor.dtype_name not in dtypes:
            raise CheckpointError(
                f"{path}: tensor {module}.{part}: got {tensor.dtype_name} {list(tensor.shape)}, expected "
                f"{' or '.join(dtypes)} {list(size)}; use a checkpoint in the layout {fmt.layout}"
            )
    if "g_idx" not in parts and (groups < 1 or in_size % groups):
        raise CheckpointError(
            f"{path}: {module}: got {groups} groups for {in_size} inputs, expected groups of one size; quantise it so"
        )
    if "g_idx" in parts:
        group = map_tensor(parts["g_idx"])
        if int(group.min()) < 0 or int(group.max()) >= groups:
            raise CheckpointError(f"{path}: tensor {module}.g_idx: names a group outside 0 to {groups - 1}; restore it")
    return PackedMatrix(format=fmt, shape=(out_size, in_size), bits=bits, parts=parts)


def _bits(path: Path, fmt: PackedFormat, module: str, packed: tuple[int, ...], out_size: int, in_size: int) -> int:
    """Bits of a code, which the packed shape tells: checkpoints may mix them."""
    choices = _AWQ_BITS if fmt.method == "awq" else _GPTQ_BITS
    for bits in choices:
        expected = (in_size, out_size * bits // 32) if fmt.method == "awq" else (in_size * bits // 32, out_size)
        if packed == expected and not (out_size * bits % 32 or (in_size * bits % 32 and fmt.method == "gptq")):
            return bits
    raise CheckpointError(
        f"{path}: tensor {module}.qweight: got shape {list(packed)}, which holds no matrix of {out_size} outputs and "
        f"{in_size} inputs in {' or '.join(map(str, choices))} bits; use a checkpoint of those bits"
    )
