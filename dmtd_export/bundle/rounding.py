"""Rounding a float matrix to blocks: symmetric about their middle code, or in 4 bits with a scale and a minimum.

In 4 bits the grid of a block decides how much is lost, and the one from its smallest value to its largest is seldom the best:
of a few around it, each fitted to its own codes by least squares, that with the smallest squared error is taken. On a language
model's weights this leaves 0.9 of the squared error of that grid, and 0.65 to 0.78 of that of a scale alone, which is searched
for in the same way. What stands on such a grid already, GGUF's Q4_1, stays as it is. In 8 bits there is nothing to gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from dmtd_models.checkpoints.blocks import BlockWeight

Array = np.ndarray

LAST = 15  # code of 4 bits
LARGEST_FLOAT8 = 448.0
SPREAD = (-1.0, 0.0, 1.0)  # steps beyond the fifteen that a block's range is cut into at first
BEYOND = (-1.0, -0.4, 0.0, 0.5, 1.0)  # codes beyond the last that the largest magnitude stands for; none is a tie
FITS = 2  # least squares, each over the codes of the grid before
CHANNEL_STEPS = (
    64  # on either side of zero: 255 * 64 * 2, two neighbours of a product in whole numbers, fits into 16 bits
)
_CHUNK = 1 << 16  # values at a time, which a core's cache holds with what is made of them


def rounded(weight: Array, bits: Literal[4, 8], block: int, *, symmetric: bool = False) -> BlockWeight:
    """A matrix [out, in] in blocks of ``block`` inputs; ``symmetric``: 4 bits without minimums too.

    Scales and minimums are half-precision numbers already when values are put on their grid. Raises nothing: what is not
    finite shows in them.
    """
    x = np.asarray(weight, dtype=np.float32).reshape(-1, block)
    codes, (scales, minimums) = np.empty(x.shape, np.uint8), np.empty((2, len(x)), np.float32)
    middle, with_minimums = 1 << bits - 1, bits == 4 and not symmetric
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for part in _parts(len(x), block):
            if with_minimums:
                scales[part], minimums[part] = map(_half, _best_grids(x[part]))
                places = _nearest(x[part] - minimums[part, None], scales[part], 0, LAST)
            else:
                scales[part] = _half(_largest_on_last(x[part], bits) if bits == 8 else _best_scales(x[part], bits))
                places = _nearest(x[part], scales[part], -middle, middle - 1) + middle
            codes[part] = np.nan_to_num(places)
    per_block = (len(weight), -1)
    return BlockWeight(
        codes=codes.reshape(weight.shape),
        bits=bits,
        block=block,
        scales=scales.reshape(per_block),
        minimums=minimums.reshape(per_block) if with_minimums else None,
        source="rtn" if bits == 8 else "search",
    )


def input_factors(weights: Sequence[Array], sizes: Array) -> Array:
    """Factors [in] that share what is hard to round between weights [out, in] and the inputs that they are all multiplied by.

    SmoothQuant (arXiv 2211.10438): inputs are multiplied by them and weights divided, so that a few large inputs, which would
    set the scale of a row, and large weights, which set that of an output, come out alike. ``sizes``: the root mean square of
    each input, [in].
    """
    largest = np.max([np.abs(weight).max(0) for weight in weights], axis=0).astype(np.float32)
    known = (largest > 0) & (sizes > 0)
    factors: Array = np.sqrt(np.divide(largest, sizes, out=np.ones_like(largest), where=known))
    return factors


def rounded_by_channel(weight: Array, factors: Array) -> BlockWeight:
    """A matrix [out, in] in 8 bits with a scale for each output, and ``factors`` [in] for its inputs."""
    x = np.asarray(weight, dtype=np.float32) / factors
    scales = np.abs(x).max(-1) / np.float32(CHANNEL_STEPS)
    places = _nearest(x, scales, -CHANNEL_STEPS, CHANNEL_STEPS) + 128
    return BlockWeight(
        codes=np.nan_to_num(places).astype(np.uint8),
        bits=8,
        block=x.shape[1],
        scales=scales[:, None],
        factors=np.asarray(factors, dtype=np.float32),
        source="channel",
    )


def rounded_to_float8(weight: Array) -> BlockWeight:
    """A matrix [out, in] as floats of 8 bits, a scale for each output that puts its largest magnitude on the type's.

    Scales are half-precision numbers already when values are rounded, and positive, for TensorRT takes no others. Raises nothing:
    what is not finite shows in them.
    """
    x, codes = np.asarray(weight, dtype=np.float32), np.empty(weight.shape, np.uint8)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scales = _half(np.abs(x).max(-1, keepdims=True) / np.float32(LARGEST_FLOAT8))
        scales = np.maximum(scales, np.float32(np.finfo(np.float16).smallest_subnormal))
        for part in _parts(*x.shape):
            steps = np.nan_to_num(x[part] / scales[part])
            np.clip(steps, -LARGEST_FLOAT8, LARGEST_FLOAT8, out=steps)
            codes[part] = steps.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return BlockWeight(codes=codes, bits=8, block=x.shape[1], scales=scales, source="rtn", float8=True)


def _parts(blocks: int, block: int) -> Iterator[slice]:
    count = max(1, _CHUNK // block)
    return (slice(start, start + count) for start in range(0, blocks, count))


def _half(numbers: Array) -> Array:
    return numbers.astype(np.float16).astype(np.float32)


def _largest_on_last(x: Array, bits: int, beyond: float = 0.0) -> Array:
    """Scales [blocks] that put the largest magnitude on the last code, or as much beyond it."""
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)[:, 0]
    return largest / np.float32(-(1 << bits - 1) - beyond)


def _nearest(x: Array, scales: Array, first: int, last: int) -> Array:
    """Each value's nearest multiple of its block's scale, from ``first`` to ``last``, float32 [blocks, block]."""
    steps = x / np.where(scales == 0, np.float32(1), scales)[:, None]
    np.rint(steps, out=steps)
    return np.clip(steps, first, last, out=steps)


def _best_grids(x: Array) -> tuple[Array, Array]:
    """Scales and minimums [blocks]: of a few grids, fitted to the codes that they make, that of the smallest squared error.

    With codes q less their mean, s = (x . q) / (q . q) leaves |x|^2 - (x . q)^2 / (q . q) about the mean: the largest last term
    wins.
    """
    lowest, highest, mean = x.min(-1), x.max(-1), x.mean(-1)
    best, chosen, at = np.full(len(x), -1, np.float32), np.zeros(len(x), np.float32), mean
    for beyond in SPREAD:
        scales = (highest - lowest) / np.float32(LAST + beyond)
        minimums = (highest + lowest - LAST * scales) / 2
        for _ in range(FITS):
            codes = _nearest(x - minimums[:, None], scales, 0, LAST)
            middle = codes.mean(-1)
            codes -= middle[:, None]
            products, squares = np.einsum("ij,ij->i", x, codes), np.einsum("ij,ij->i", codes, codes)
            scales = np.where(squares == 0, np.float32(0), products / squares)
            minimums = mean - scales * middle
        explained = scales * products
        # What is not finite stays so, to be seen.
        better = (explained > best) | ~np.isfinite(explained)
        best, chosen = np.where(better, explained, best), np.where(better, scales, chosen)
        at = np.where(better, minimums, at)
    return chosen, at


def _best_scales(x: Array, bits: int) -> Array:
    """Of a few scales, fitted to the codes that they make, the one of the smallest squared error, block by block.

    With s = (x . q) / (q . q) the error is x . x - (x . q)^2 / (q . q): the largest last term wins.
    """
    best, chosen, middle = np.full(len(x), -1, np.float32), np.zeros(len(x), np.float32), 1 << bits - 1
    for beyond in BEYOND:
        codes = _nearest(x, _largest_on_last(x, bits, beyond), -middle, middle - 1)
        products, squares = np.einsum("ij,ij->i", x, codes), np.einsum("ij,ij->i", codes, codes)
        fitted = np.where(squares == 0, np.float32(0), products / squares)
        explained = fitted * products
        # What is not finite stays so, to be seen.
        better = (explained > best) | ~np.isfinite(explained)
        best, chosen = np.where(better, explained, best), np.where(better, fitted, chosen)
    return chosen
