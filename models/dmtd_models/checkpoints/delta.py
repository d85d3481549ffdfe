"""A trained tensor's difference to the base in few bits. Stands under ``adapter``, which keeps these tensors; no torch.

For a matrix ``<name>`` [out, in] an adapter holds

    <name>.delta    int8 [out, in] for 8 bits; for fewer, uint8 [out, in * bits / 8]: a row's numbers, each with
                    2^(bits - 1) - 1 added, as a string of bits, the highest of each first
    <name>.scale    float32 [out, groups]: the step of each group of in / groups neighbours of a row

and the difference is step times number. A vector stands as it is: ``<name>.delta`` float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from dmtd_models.checkpoints.protocol import AnyArray

Float32 = npt.NDArray[np.float32]
FEWEST_BITS: Final = 3
MOST_BITS: Final = 8
_GROUP = 64  # neighbours that share a step, below 8 bits


def quantised_delta(name: str, difference: AnyArray, bits: int = MOST_BITS) -> dict[str, AnyArray]:
    """The tensors that stand for a difference.

    The step of a group is the one of 20 shrunken ranges that leaves the least squared error: few values are near the largest.

    Args:
        name: of the tensor.
        difference: a matrix [out, in] or a vector.
        bits: of each number, 3 to 8. A matrix whose rows such numbers do not fill to whole bytes gets 8.
    """
    wide = np.asarray(difference, dtype=np.float32)
    if wide.ndim != 2:
        return {f"{name}.delta": wide}
    rows, width = wide.shape
    if width * bits % 8:
        bits = MOST_BITS
    group = _GROUP if bits < MOST_BITS and width % _GROUP == 0 else width
    numbers, steps = _rounded(wide.reshape(rows, -1, group), 2 ** (bits - 1) - 1)
    numbers = numbers.reshape(rows, width)
    return {f"{name}.delta": numbers if bits == MOST_BITS else _packed(numbers, bits), f"{name}.scale": steps}


def delta_difference(tensors: Mapping[str, AnyArray], name: str, shape: tuple[int, ...]) -> Float32:
    """The stored difference of one tensor of ``shape``, float32."""
    delta = tensors[f"{name}.delta"]
    if len(shape) == 1:
        return np.asarray(delta, dtype=np.float32)
    numbers = _unpacked(delta, shape[1]) if delta.dtype == np.uint8 else delta
    steps = np.asarray(tensors[f"{name}.scale"], dtype=np.float32)
    groups = np.asarray(numbers, dtype=np.float32).reshape(shape[0], steps.shape[1], -1)
    difference: Float32 = (groups * steps[..., None]).reshape(shape)
    return difference


def misfit(tensors: Mapping[str, AnyArray], name: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the tensors of one difference, if they cannot be those of a tensor of ``shape``."""
    delta = tensors[f"{name}.delta"]
    if len(shape) == 2 and delta.dtype == np.uint8 and delta.shape[:1] == shape[:1] and delta.ndim == 2:
        bits, rest = divmod(8 * delta.shape[1], shape[1])
        if rest or not FEWEST_BITS <= bits < MOST_BITS:
            return f"{name}.delta: got {delta.shape[1]} bytes a row, expected {FEWEST_BITS} to {MOST_BITS - 1} bits x {shape[1]}"
    elif delta.shape != shape:
        return f"{name}: got {list(delta.shape)}, expected {list(shape)}"
    if len(shape) == 2:
        steps = tensors[f"{name}.scale"].shape
        if len(steps) != 2 or steps[0] != shape[0] or not steps[1] or shape[1] % steps[1]:
            return f"{name}.scale: got {list(steps)}, expected [{shape[0]}, a divisor of {shape[1]}]"
    return None


def _rounded(groups: Float32, most: int) -> tuple[npt.NDArray[np.int8], Float32]:
    """Numbers from -most to most of groups [rows, groups, n], in their shape, and steps [rows, groups]."""
    largest = np.maximum(np.abs(groups).max(axis=-1, keepdims=True), 1e-12)
    best_error = np.full_like(largest, np.inf)
    best = np.zeros_like(groups, dtype=np.int8)
    steps = largest / most
    for shrink in np.linspace(1.0, 0.62, 20, dtype=np.float32):
        step = largest * shrink / most
        rounded = np.clip(np.round(groups / step), -most, most)
        error = np.square(rounded * step - groups).sum(axis=-1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = np.where(better, rounded.astype(np.int8), best)
        steps = np.where(better, step, steps)
    return best, steps[..., 0].astype(np.float32)


def _packed(numbers: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    """Numbers [rows, n] as strings of bits, uint8 [rows, n * bits / 8]."""
    raised = (numbers.astype(np.int16) + 2 ** (bits - 1) - 1).astype(np.uint8)
    places = np.unpackbits(raised[..., None], axis=-1)[..., -bits:]
    return np.packbits(places.reshape(len(numbers), -1), axis=-1)


def _unpacked(packed: AnyArray, width: int) -> npt.NDArray[np.int16]:
    """Numbers int16 [rows, width] of strings of bits."""
    bits = 8 * packed.shape[1] // width
    places = np.unpackbits(np.asarray(packed, dtype=np.uint8), axis=-1).reshape(len(packed), width, bits)
    raised = np.packbits(places, axis=-1)[..., 0] >> (8 - bits)
    return raised.astype(np.int16) - (2 ** (bits - 1) - 1)
