"""Rounding a float matrix to blocks of 4 bits by what a model feeds it, instead of by its values alone.

    X [tokens, in], inputs of a product --> moments = X^T X / tokens --> inverse_factor --> compensated(weight, factor)

What a product loses is the size of X (W - Q)^T. Inputs are rounded one after another, and those that follow take up what each of
them lost as far as they go along with it in the text: GPTQ (arXiv 2210.17323). A block's grid is chosen when its turn comes, for
the values that are left by then: of a few like those of ``rounding``, fitted by least squares where an input counts by what
cannot be taken up, the one with which the whole block loses least. Needs torch. Nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dmtd_export.bundle.rounding import BEYOND, FITS, LAST
from dmtd_models.checkpoints.blocks import BlockWeight
from dmtd_runtime.bundle.manifest import CALIBRATED

Array = np.ndarray

# Of the mean moment, added to each, for a text of so many tokens; moments of more are nearer to those of all text, and less is
# added. SmolLM2 in blocks of 64 without minimums, perplexity over float32's on text that was not read: after 4096 tokens 1.35
# with 0.1 and 1.30 with 0.05, after 32768 tokens 1.25 with 0.1 and with 0.05, and 1.21, 1.23, 1.24 with 0.03, 0.018, 0.01.
DAMPING, DAMPED_TOKENS = 0.05, 4096
# Steps beyond the fifteen that a block's range is cut into at first; one less would be a tie at both ends.
SPREAD = (-1.2, 0.0, 1.0)
MIDDLE = 8  # code of a zero without minimums
_ROWS = 4096  # outputs at a time, which bounds the memory


def inverse_factor(moments: Tensor, tokens: int) -> Tensor:
    """The upper triangular U with U^T U = inverse of the moments, damped; float32 [in, in].

    Of input i, 1 / U[i, i]^2 is the moment that is left when the inputs behind it have taken up what they can.

    Args:
        moments: [in, in], of any scale; all zeros count as inputs that have nothing to do with each other.
        tokens: of the text that they are of.
    """
    wide = moments.double().flip(0, 1)
    mean = float(wide.diagonal().mean()) or 1.0
    wide.diagonal().add_(DAMPING * math.sqrt(DAMPED_TOKENS / tokens) * mean)
    # Of the flipped matrix L L^T, flipped back: an upper triangle R with R R^T = moments, whose inverse is U.
    upper = torch.linalg.cholesky(wide).flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype)
    return torch.linalg.solve_triangular(upper, identity, upper=True).float()


def compensated(weight: Array, factor: Tensor, block: int, *, symmetric: bool) -> BlockWeight:
    """A matrix [out, in] in blocks of 4 bits of ``block`` inputs, with minimums or (``symmetric``) without.

    ``factor``: what ``inverse_factor`` makes of its inputs' moments. Scales and minimums are half-precision numbers. Raises
    nothing: what is not finite shows in them.
    """
    codes, factor = np.empty(weight.shape, np.uint8), factor.detach()
    per_block = np.empty((2, len(weight), weight.shape[1] // block), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        left = torch.from_numpy(np.array(weight[rows], dtype=np.float32).T.copy())
        for at, (found, grid) in zip(_blocks(len(left), block), _rounded(left, factor, block, symmetric), strict=True):
            codes[rows, at] = found.T.numpy()
            per_block[:, rows, at.start // block] = grid.numpy()
    return BlockWeight(
        codes=codes,
        bits=4,
        block=block,
        scales=per_block[0],
        minimums=None if symmetric else per_block[1],
        source=CALIBRATED,
    )


def _blocks(inputs: int, block: int) -> Iterator[slice]:
    return (slice(start, start + block) for start in range(0, inputs, block))


def _rounded(left: Tensor, factor: Tensor, block: int, symmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each block in turn: codes uint8 [block, rows], and scales and minimums [2, rows]. ``left`` [in, rows] is used up."""
    for at in _blocks(len(left), block):
        own, values = factor[at, at], left[at]
        counts = own.diagonal() ** -2
        grids = _scales(values, counts) if symmetric else _grids(values, counts)
        codes, lost = _through(values, grids, own)
        best = (lost**2).sum(0).argmin(0)  # [rows]
        codes, lost = (each.gather(1, best.expand(block, 1, -1))[:, 0] for each in (codes, lost))
        left[at.stop :] -= factor[at, at.stop :].T @ lost
        yield codes.nan_to_num().to(torch.uint8), grids.gather(1, best.expand(2, 1, -1))[:, 0]


def _through(values: Tensor, grids: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Round a block's inputs one after another on each of some grids.

    Args:
        values: [block, rows].
        grids: scales and minimums [2, grids, rows].
        own: the block's part of the factor [block, block].

    Returns:
        Codes [block, grids, rows], and what each input lost, in units of its own U[i, i], of the same shape.
    """
    scales, minimums = grids
    steps = torch.where(scales == 0, 1.0, scales)
    left = values[:, None].repeat(1, len(scales), 1)
    codes, lost = torch.empty_like(left), torch.empty_like(left)
    for i in range(len(values)):
        codes[i] = ((left[i] - minimums) / steps).round_().clamp_(0, LAST)
        lost[i] = (left[i] - (codes[i] * scales + minimums)) / own[i, i]
        left[i + 1 :] -= own[i, i + 1 :, None, None] * lost[i]
    return codes, lost


def _scales(values: Tensor, counts: Tensor) -> Tensor:
    """Scales [2, grids, rows] for values [block, rows] whose inputs count by ``counts`` [block]; the second: code 0's values."""
    largest = values.gather(0, values.abs().argmax(0, keepdim=True))[0]
    found = []
    for beyond in BEYOND:
        scales = largest / (-MIDDLE - beyond)
        codes = (values / torch.where(scales == 0, 1.0, scales)).round_().clamp_(-MIDDLE, MIDDLE - 1)
        found.append(_half(_ratio(counts @ (values * codes), counts @ codes**2)))
    scales = torch.stack(found)
    return torch.stack((scales, -MIDDLE * scales))


def _grids(values: Tensor, counts: Tensor) -> Tensor:
    """Scales and minimums [2, grids, rows] for values [block, rows] whose inputs count by ``counts`` [block]."""
    shares = counts / counts.sum()
    lowest, highest, mean = values.amin(0), values.amax(0), shares @ values
    found = []
    for beyond in SPREAD:
        scales = (highest - lowest) / (LAST + beyond)
        minimums = (highest + lowest - LAST * scales) / 2
        for _ in range(FITS):
            codes = ((values - minimums) / torch.where(scales == 0, 1.0, scales)).round_().clamp_(0, LAST)
            middle = shares @ codes
            codes -= middle
            scales = _ratio(shares @ (values * codes), shares @ codes**2)
            minimums = mean - scales * middle
        found.append(torch.stack((_half(scales), _half(minimums))))
    return torch.stack(found, 1)


def _ratio(products: Tensor, squares: Tensor) -> Tensor:
    return torch.where(squares == 0, squares, products / squares)


def _half(numbers: Tensor) -> Tensor:
    return numbers.half().float()
