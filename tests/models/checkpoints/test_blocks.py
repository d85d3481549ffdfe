"""Weights in blocks: values by the definition, one by one, and the form of kernels with a fixed zero point."""

from dataclasses import replace

import numpy as np
import pytest

from dmtd_models.checkpoints.blocks import BlockWeight


def random_blocks(bits, block, *, minimums, levels=0, rows=3, seed=5):
    rng = np.random.default_rng(seed)
    shape = (rows, 256 // block)
    return BlockWeight(
        codes=rng.integers(0, levels or 1 << bits, (rows, 256), dtype=np.uint8),
        bits=bits,
        block=block,
        scales=rng.normal(size=shape).astype(np.float32),
        minimums=rng.normal(size=shape).astype(np.float32) if minimums else None,
        levels=levels,
        source="test",
    )


def by_definition(weight):
    """Python's own floats of each value."""
    out = np.empty(weight.shape)
    for row in range(weight.shape[0]):
        for col in range(weight.shape[1]):
            scale, code = float(weight.scales[row, col // weight.block]), int(weight.codes[row, col])
            if weight.minimums is None:
                out[row, col] = scale * (code - {4: 8, 8: 128}[weight.bits])
            else:
                out[row, col] = scale * code + float(weight.minimums[row, col // weight.block])
    return out


@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 16), (4, 128), (8, 64)])
def test_values(bits, block, minimums):
    weight = random_blocks(bits, block, minimums=minimums)
    np.testing.assert_allclose(weight.dequantised(), by_definition(weight), rtol=1e-6, atol=1e-5)
    assert weight.dequantised().dtype == np.float32


@pytest.mark.parametrize(("bits", "levels"), [(4, 16), (8, 256), (8, 32), (8, 64), (4, 4)])
def test_centred_codes_have_the_same_values(bits, levels):
    weight = random_blocks(bits, 32, minimums=True, levels=levels)
    codes, offsets = weight.centred()
    middle = {4: 8, 8: 128}[bits]
    assert codes.min() == middle - levels // 2
    assert codes.max() == middle + levels // 2 - 1
    scales = weight.scales.astype(np.float64).repeat(32, axis=1)
    values = scales * (codes.astype(np.float64) - middle) + offsets.astype(np.float64).repeat(32, axis=1)
    np.testing.assert_allclose(values, by_definition(weight), atol=2e-5)


def test_symmetric_codes_stay():
    weight = random_blocks(4, 32, minimums=False)
    codes, offsets = weight.centred()
    assert codes is weight.codes
    assert offsets is None


@pytest.mark.parametrize("minimums", [False, True])
def test_rows_move_with_their_scales(minimums):
    weight = random_blocks(4, 32, minimums=minimums)
    moved = weight.rearranged(lambda array: array[[2, 0, 1]])
    np.testing.assert_array_equal(moved.dequantised(), weight.dequantised()[[2, 0, 1]])


@pytest.mark.parametrize(("levels", "zeros"), [(16, (0, 15)), (4, (-6, 9))])
def test_minimums_that_are_zero_points(levels, zeros):
    """Of 2 bits in a container of 4, whose codes lie about its middle, there are more."""
    weight = random_blocks(4, 32, minimums=True, levels=levels)
    below = np.linspace(*zeros, weight.scales.size).round().reshape(weight.scales.shape).astype(np.float32)
    whole = replace(weight, minimums=-weight.scales * below)
    assert whole.has_zero_points
    for number in (zeros[0] - 1, zeros[1] + 1):
        assert not replace(weight, minimums=-weight.scales * np.float32(number)).has_zero_points
    beside = whole.minimums.copy()
    beside[1, 2] = np.nextafter(beside[1, 2], np.float32(9))
    assert not replace(whole, minimums=beside).has_zero_points
    none, nothing = whole.scales.copy(), whole.minimums.copy()
    none[1, 2] = nothing[1, 2] = 0
    assert replace(whole, scales=none, minimums=nothing).has_zero_points, "any of its codes is zero"
    nothing[1, 2] = 1
    assert not replace(whole, scales=none, minimums=nothing).has_zero_points


def test_other_blocks_have_no_zero_points():
    assert not random_blocks(4, 32, minimums=False).has_zero_points
    weight = random_blocks(8, 32, minimums=True)
    assert not replace(weight, minimums=-weight.scales).has_zero_points
