"""Margins of roundings: they follow depth and block, and a share of few rows is not held to what many rows agree in."""

from __future__ import annotations

import numpy as np
import pytest

from dmtd_export.verify.margins import FLOAT32, INT8_TOP1_AGREEMENT, float32_margin, int8_margin


def test_in_larger_blocks_more_values_share_the_largest_one() -> None:
    """4.1, 5.5 and 7.4 times the root mean square in blocks of 32, 64 and 128 of SmolLM2's inputs."""
    usual = int8_margin(30).limit
    for block, peak in ((16, 4.1), (32, 4.1), (64, 5.5), (128, 7.4)):
        assert int8_margin(30, block=block).limit == pytest.approx(usual * peak / 4.1, rel=0.02)


def test_whole_cycles_through_more_layers_round_more_often() -> None:
    assert float32_margin(5) == float32_margin(16) == FLOAT32
    assert float32_margin(30).limit > 2.2e-5, "what a right bundle of 30 layers showed"
    assert float32_margin(64).limit == pytest.approx(2 * FLOAT32.limit)


def test_few_rows_are_not_held_to_the_share_of_many() -> None:
    margin, rng = int8_margin(30), np.random.default_rng(0)
    for rows in (25, 100, 1000):
        right = rng.binomial(rows, 0.8, 10_000)  # of a right bundle, whose roundings change a fifth of random tokens
        assert (right < margin.least_agreement(rows) * rows).mean() < 0.01
        wrong = rng.binomial(rows, 0.3, 10_000)
        assert (wrong < margin.least_agreement(rows) * rows).mean() > 0.99
    assert (rng.binomial(25, 0.8, 10_000) < INT8_TOP1_AGREEMENT * 25).mean() > 0.1, "the bare share refused one in ten"
