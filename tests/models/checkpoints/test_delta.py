"""A difference in few bits is what was rounded, and no worse than the plainest rounding."""

from __future__ import annotations

import numpy as np
import pytest

from dmtd_models.checkpoints.delta import delta_difference, misfit, quantised_delta


def spread(width: int) -> np.ndarray:
    """Rows of many sizes, one of them with a value far out, one empty."""
    random = np.random.default_rng(0)
    wide = (random.standard_normal((6, width)) * np.array([[1], [1e-4], [10], [1], [1], [0]])).astype(np.float32)
    wide[3] = np.where(np.arange(width) == 7, 100.0, wide[3])
    return wide


@pytest.mark.parametrize("width", [400, 192])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_the_step_of_a_group_is_no_worse_than_its_full_range(bits: int, width: int) -> None:
    wide = spread(width)
    cut = quantised_delta("w", wide, bits)
    found = delta_difference(cut, "w", wide.shape)
    group = 64 if bits < 8 and width % 64 == 0 else width
    assert cut["w.scale"].shape == (6, width // group)
    assert cut["w.delta"].shape == (6, width * bits // 8) and cut["w.delta"].dtype == (
        np.int8 if bits == 8 else np.uint8
    )
    parts, most = wide.reshape(6, -1, group), 2 ** (bits - 1) - 1
    full = np.maximum(np.abs(parts).max(axis=-1, keepdims=True), 1e-12) / most
    plainest = np.square(np.round(parts / full) * full - parts).sum(axis=-1)
    error = np.square(found.reshape(parts.shape) - parts).sum(axis=-1)
    assert (error <= plainest * 1.0001 + 1e-20).all() and error[:5].max() > 0
    numbers = found.reshape(parts.shape) / cut["w.scale"][..., None]
    np.testing.assert_allclose(numbers, np.round(numbers), atol=1e-3)
    assert np.abs(numbers).max() <= most + 1e-3 and not found[5].any()


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_numbers_on_the_grid_come_back_unchanged(bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    numbers = np.random.default_rng(1).integers(-most, most + 1, size=(5, 128))
    numbers[:, ::64] = most  # every group reaches its range
    wide = (numbers * 0.25).astype(np.float32)
    cut = quantised_delta("w", wide, bits)
    np.testing.assert_allclose(delta_difference(cut, "w", wide.shape), wide, rtol=1e-6)
    assert misfit(cut, "w", wide.shape) is None


def test_rows_that_fill_no_bytes_keep_eight_bits_and_vectors_stand_as_they_are() -> None:
    cut = quantised_delta("w", spread(401), 5)
    assert cut["w.delta"].dtype == np.int8 and misfit(cut, "w", (6, 401)) is None
    vector = np.arange(5, dtype=np.float32)
    assert np.array_equal(delta_difference(quantised_delta("v", vector, 4), "v", (5,)), vector)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((6, 192), None), ((6, 384), "120 bytes a row"), ((5, 192), "expected [5, 192]"), ((6, 128), "120 bytes a row")],
)
def test_tensors_of_another_shape_are_named(shape: tuple[int, int], words: str | None) -> None:
    problem = misfit(quantised_delta("w", spread(192), 5), "w", shape)
    assert problem is None if words is None else problem is not None and words in problem
