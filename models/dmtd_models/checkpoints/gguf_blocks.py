"""GGUF's quantised tensors as ``BlockWeight``s: the stored codes and scales, nothing rounded again. No torch.

Stands under ``gguf``. A K-quant's super-block of 256 values has small integer scales for its blocks of 16 or 32: each
block gets its own float32 scale and minimum here, the products that every reader of the format computes. The values are
those of the ``gguf`` package bit for bit; layouts are ggml's (ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dmtd_models.checkpoints.blocks import BlockWeight

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
# Codes uint8 [blocks, values], scales float32 [blocks, parts], minimums the same or None for a symmetric type.
_Parts = tuple[Bytes, Float32, Float32 | None]


def block_weight(raw: Bytes, kind: str) -> BlockWeight:
    """The blocks of a matrix.

    Args:
        raw: uint8 [rows, bytes of a row], as stored.
        kind: one of ``BLOCK_TYPES``.
    """
    size, bits, block, levels, read = _TYPES[kind]
    rows = raw.shape[0]
    codes, scales, minimums = read(raw.reshape(-1, size))
    if minimums is None:  # symmetric about the type's own middle, which moves to the container's
        codes += np.uint8((1 << bits - 1) - levels // 2)
    return BlockWeight(
        codes=codes.reshape(rows, -1),
        bits=bits,
        block=block,
        scales=scales.reshape(rows, -1),
        minimums=None if minimums is None else minimums.reshape(rows, -1),
        levels=1 << bits if minimums is None else levels,
        source=kind,
    )


def _half(raw: Bytes) -> Float32:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """[blocks, bytes] to [blocks, 2 x bytes]: of each run of bytes the low halves, then the high ones."""
    split = packed.reshape(len(packed), -1, 1, run) >> np.array([0, 4], np.uint8)[:, None]
    return (split & np.uint8(15)).reshape(len(packed), -1)


def _pairs(packed: Bytes, run: int) -> Bytes:
    """[blocks, bytes] to [blocks, 4 x bytes]: of each run of bytes the lowest two bits, then the next two, and so on."""
    split = packed.reshape(len(packed), -1, 1, run) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (split & np.uint8(3)).reshape(len(packed), -1)


def _bits(packed: Bytes) -> Bytes:
    """[blocks, bytes] to [blocks, 8 x bytes]: byte by byte, the lowest bit first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _bit_planes(packed: Bytes) -> Bytes:
    """[blocks, bytes] to [blocks, 8 x bytes]: bit 0 of all bytes, then bit 1, and so on."""
    planes = packed[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]
    return (planes & np.uint8(1)).reshape(len(packed), -1)


def _q4_0(raw: Bytes) -> _Parts:
    return _nibbles(raw[:, 2:], 16), _half(raw[:, :2]), None


def _q4_1(raw: Bytes) -> _Parts:
    return _nibbles(raw[:, 4:], 16), _half(raw[:, :2]), _half(raw[:, 2:4])


def _q5_0(raw: Bytes) -> _Parts:
    return _nibbles(raw[:, 6:], 16) | _bits(raw[:, 2:6]) << np.uint8(4), _half(raw[:, :2]), None


def _q5_1(raw: Bytes) -> _Parts:
    codes = _nibbles(raw[:, 8:], 16) | _bits(raw[:, 4:8]) << np.uint8(4)
    return codes, _half(raw[:, :2]), _half(raw[:, 2:4])


def _q8_0(raw: Bytes) -> _Parts:
    return raw[:, 2:] + np.uint8(128), _half(raw[:, :2]), None  # int8 bytes: adding 128 wraps to the code


def _q2_k(raw: Bytes) -> _Parts:
    scales = raw[:, :16]
    minimums = -(_half(raw[:, 82:84]) * (scales >> 4))
    return _pairs(raw[:, 16:80], 32), _half(raw[:, 80:82]) * (scales & np.uint8(15)), minimums


def _q3_k(raw: Bytes) -> _Parts:
    codes = _pairs(raw[:, 32:96], 32) | _bit_planes(raw[:, :32]) << np.uint8(2)
    low = raw[:, 96:104]
    high = _pairs(raw[:, 104:108], 4)
    scales = np.concatenate([low & np.uint8(15), low >> 4], axis=1) | high << np.uint8(4)
    return codes, _half(raw[:, 108:110]) * (scales.astype(np.float32) - 32), None


def _scales_and_minimums(raw: Bytes) -> tuple[Float32, Float32]:
    """Of Q4_K and Q5_K: 8 six-bit scales and minimums of a super-block in 12 bytes, each under its half-precision factor."""
    first, second, third = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = np.concatenate([first & np.uint8(63), third & np.uint8(15) | first >> 2 & np.uint8(48)], axis=1)
    minimums = np.concatenate([second & np.uint8(63), third >> 4 | second >> 2 & np.uint8(48)], axis=1)
    return _half(raw[:, :2]) * scales, -(_half(raw[:, 2:4]) * minimums)


def _q4_k(raw: Bytes) -> _Parts:
    return _nibbles(raw[:, 16:], 32), *_scales_and_minimums(raw)


def _q5_k(raw: Bytes) -> _Parts:
    return _nibbles(raw[:, 48:], 32) | _bit_planes(raw[:, 16:48]) << np.uint8(4), *_scales_and_minimums(raw)


def _q6_k(raw: Bytes) -> _Parts:
    codes = _nibbles(raw[:, :128], 64) | _pairs(raw[:, 128:192], 32) << np.uint8(4)
    scales = raw[:, 192:208].view(np.int8).astype(np.float32)
    return codes, _half(raw[:, 208:210]) * scales, None


# Bytes of a block (of a super-block), bits of the container, values that share a scale, codes of the type, reader.
_TYPES: dict[str, tuple[int, int, int, int, Callable[[Bytes], _Parts]]] = {
    "Q4_0": (18, 4, 32, 16, _q4_0),
    "Q4_1": (20, 4, 32, 16, _q4_1),
    "Q5_0": (22, 8, 32, 32, _q5_0),
    "Q5_1": (24, 8, 32, 32, _q5_1),
    "Q8_0": (34, 8, 32, 256, _q8_0),
    "Q2_K": (84, 4, 16, 4, _q2_k),
    "Q3_K": (110, 4, 16, 8, _q3_k),
    "Q4_K": (144, 4, 32, 16, _q4_k),
    "Q5_K": (176, 8, 32, 32, _q5_k),
    "Q6_K": (210, 8, 16, 64, _q6_k),
}
BLOCK_TYPES = tuple(_TYPES)
