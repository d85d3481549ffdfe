"""Rounding with the moments of inputs, held to optimal brain quantisation with the explicit inverse, in float64 and numpy."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dmtd_export.bundle.compensation import compensated, inverse_factor  # noqa: E402
from dmtd_export.bundle.rounding import rounded  # noqa: E402
from dmtd_models.checkpoints.blocks import BlockWeight  # noqa: E402

Array = np.ndarray
INPUTS = 48
CLEAR = 1e-4  # of a step or a loss, what float32 may be off by


def inputs(seed: int, count: int = 400, width: int = INPUTS) -> Array:
    """Inputs [count, width] that go along with each other, some of them far larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width // 3)) @ rng.standard_normal((width // 3, width))
    x: Array = (mixed + 0.5 * rng.standard_normal((count, width))) * np.exp(rng.standard_normal(width))
    return x.astype(np.float32)


def weights(seed: int, rows: int, width: int = INPUTS) -> Array:
    return np.random.default_rng(seed).standard_t(5, (rows, width)).astype(np.float32)


def product(weight: Array, x: Array, *, symmetric: bool, block: int = 16) -> BlockWeight:
    moments = torch.from_numpy(x.T @ x / len(x))
    return compensated(weight, inverse_factor(moments, 4096), block, symmetric=symmetric)


def lost(weight: Array, made: BlockWeight, x: Array) -> float:
    """The squared size of X (W - Q)^T."""
    apart = weight.astype(np.float64) - made.dequantised()
    return float(((x.astype(np.float64) @ apart.T) ** 2).sum())


def without_first(inverse: Array) -> Array:
    """The inverse of the moments of all inputs but the first, out of that of all."""
    return (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]


class SlowRow:
    """One row, rounded input by input: the others take up what each lost, by the explicit inverse of those that are left.

    ``clear``: no number was so near to the middle between two codes, two halves or two grids that float32 may go the other way.
    """

    def __init__(self, row: Array, inverse: Array, block: int, *, symmetric: bool) -> None:
        self.clear = True
        self.codes, self.grids = list[int](), list[tuple[float, float]]()
        left = row.astype(np.float64)
        while len(left):
            counts, inner = list[float](), inverse
            for _ in range(block):
                counts.append(1 / inner[0, 0])
                inner = without_first(inner)
            grids = set(self._candidates(left[:block], np.array(counts), symmetric=symmetric))
            tried = sorted((self._through(left, inverse, block, *grid), grid) for grid in grids)
            if len(tried) > 1:
                self.clear &= tried[1][0][0] > tried[0][0][0] * (1 + CLEAR)
            (_, codes, rest), grid = tried[0]
            self.codes += codes
            self.grids.append(grid)
            left, inverse = np.array(rest), inner

    def _through(
        self, left: Array, inverse: Array, block: int, scale: float, minimum: float
    ) -> tuple[float, list[int], list[float]]:
        loss, codes = 0.0, list[int]()
        for _ in range(block):
            codes.append(int(self._code((left[0] - minimum) / scale)))
            apart = left[0] - (scale * codes[-1] + minimum)
            loss += apart**2 / inverse[0, 0]
            left = left[1:] - apart * inverse[0, 1:] / inverse[0, 0]
            inverse = without_first(inverse)
        return loss, codes, left.tolist()

    def _candidates(self, x: Array, counts: Array, *, symmetric: bool) -> list[tuple[float, float]]:
        """Scales and minimums that are tried for a block whose inputs count differently."""
        found = []
        if symmetric:
            for last in (7, 7.6, 8, 8.5, 9):
                scale = max(x, key=abs) / -last
                codes = np.array([self._code(place + 8) - 8 for place in x / scale])
                scale = self._half((counts * x * codes).sum() / (counts * codes**2).sum())
                found.append((scale, -8 * scale))
            return found
        for steps in (13.8, 15, 16):
            scale = (x.max() - x.min()) / steps
            minimum = (x.max() + x.min()) / 2 - 7.5 * scale
            for _ in range(2):
                codes = np.array([self._code(place) for place in (x - minimum) / scale])
                scale, minimum = np.polyfit(codes, x, 1, w=np.sqrt(counts))
            found.append((self._half(scale), self._half(minimum)))
        return found

    def _code(self, place: float) -> float:
        self.clear &= abs(place - np.floor(place) - 0.5) > CLEAR or not 0 < place < 15
        return float(min(max(np.rint(place), 0), 15))

    def _half(self, number: float) -> float:
        near = {float(np.float16(number + sign * 3e-6 * abs(number))) for sign in (-1, 0, 1)}
        self.clear &= len(near) == 1
        return float(np.float16(number))


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_optimal_brain_quantisation_by_the_explicit_inverse(*, symmetric: bool) -> None:
    x, weight, block = inputs(0), weights(1, 60), 16
    moments = (x.T @ x / len(x)).astype(np.float64)
    inverse = np.linalg.inv(moments + 0.05 * np.diag(moments).mean() * np.eye(INPUTS))
    made = product(weight, x, symmetric=symmetric, block=block)
    assert made.minimums is None if symmetric else made.minimums is not None
    compared = 0
    for row, codes, scales in zip(range(len(weight)), made.codes, made.scales, strict=True):
        slow = SlowRow(weight[row], inverse, block, symmetric=symmetric)
        if not slow.clear:
            continue
        compared += 1
        assert codes.tolist() == slow.codes
        np.testing.assert_array_equal(scales, np.float32([scale for scale, _ in slow.grids]))
        if made.minimums is not None:
            np.testing.assert_array_equal(made.minimums[row], np.float32([minimum for _, minimum in slow.grids]))
    assert compared >= 20


def test_more_text_is_damped_less() -> None:
    """Moments of four times as many tokens are half as uncertain."""
    moments = torch.diag(torch.tensor([1.0, 3.0]))
    for tokens, added in ((4096, 0.05), (16384, 0.025), (1024, 0.1)):
        left = inverse_factor(moments, tokens).diagonal() ** -2
        assert left.tolist() == pytest.approx([1 + 2 * added, 3 + 2 * added])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32])
def test_a_product_loses_less_than_half_of_what_rounding_by_values_loses(block: int, *, symmetric: bool) -> None:
    x, weight = inputs(2, width=96), weights(3, 64, width=96)
    by_values = rounded(weight, 4, block, symmetric=symmetric)
    assert lost(weight, product(weight, x, symmetric=symmetric, block=block), x) < 0.5 * lost(weight, by_values, x)


def test_inputs_that_have_nothing_to_do_with_each_other_leave_it_at_rounding() -> None:
    weight = weights(4, 50)
    for symmetric in (True, False):
        made = compensated(weight, inverse_factor(torch.zeros(INPUTS, INPUTS), 4096), 16, symmetric=symmetric)
        steps = np.abs(weight - made.dequantised()) / np.repeat(np.abs(made.scales), 16, axis=1)
        inside = (made.codes > 0) & (made.codes < 15)
        assert steps[inside].max() < 0.501
        by_values = rounded(weight, 4, 16, symmetric=symmetric).dequantised()
        apart, usual = (((weight - each) ** 2).sum() for each in (made.dequantised(), by_values))
        assert apart < 1.02 * usual


def test_what_is_in_the_format_already_stays_as_it_is() -> None:
    codes = np.random.default_rng(5).integers(-8, 8, (40, 3, 16))
    codes[..., :2] = -8, 7
    scales = np.random.default_rng(6).choice([0.25, -0.5, 0.015625], (40, 3, 1))
    for symmetric, minimum in ((True, 0.0), (False, 0.75)):
        weight = np.float32(codes * scales + minimum).reshape(40, INPUTS)
        np.testing.assert_array_equal(product(weight, inputs(7), symmetric=symmetric).dequantised(), weight)


def test_more_rows_than_are_rounded_at_a_time_are_the_same_rows() -> None:
    x, weight = inputs(8, width=16), weights(9, 5000, width=16)
    whole, part = (product(rows, x, symmetric=True) for rows in (weight, weight[4990:]))
    np.testing.assert_array_equal(whole.dequantised()[4990:], part.dequantised())


def test_blocks_of_zeros_stay_zero_and_what_is_not_finite_shows() -> None:
    x = inputs(10)
    assert (product(np.zeros((3, INPUTS), np.float32), x, symmetric=True).dequantised() == 0).all()
    for value in (np.inf, np.nan):
        weight = weights(11, 2)
        weight[1, 20] = value
        finite = np.isfinite(product(weight, x, symmetric=False).scales)
        assert finite[0].all() and finite[1, 0] and not finite[1, 1]
