"""The exporter's rotary tables (numpy) against the torch reference, against transformers, and against arithmetic."""

import math

import numpy as np
import pytest
import torch

from dmtd_models.config.model import Rope
from dmtd_models.reference.layers import inverse_frequencies as torch_inverse_frequencies
from dmtd_models.reference.layers import rotary
from dmtd_models.reference.rope import attention_factor, inverse_frequencies, rotary_tables

ROPES = [
    *[Rope(theta=theta) for theta in (10000.0, 100000.0, 500000.0, 1000000.0, 5000000.0)],
    Rope(theta=10000.0, kind="linear", factor=4.0),
    *[
        Rope(
            theta=500000.0,
            kind="llama3",
            factor=factor,
            original_max_positions=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
        for factor in (8.0, 32.0)
    ],
    *[
        Rope(
            theta=1000000.0,
            kind="yarn",
            factor=factor,
            original_max_positions=32768,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=truncate,
        )
        for factor, truncate in ((4.0, True), (3.0, False))
    ],
]


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.kind}-{rope.theta:g}-{rope.factor}")
def test_numpy_and_torch_frequencies(rope, head_dim):
    """Bit for bit, but for one frequency in some tables, which is off by the last bit of a power (see ``rope``)."""
    ours, reference = inverse_frequencies(rope, head_dim), torch_inverse_frequencies(rope, head_dim).numpy()
    assert ours.dtype == reference.dtype == np.float32
    assert (ours != reference).sum() <= 1
    np.testing.assert_allclose(ours, reference, rtol=1.2e-7)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.kind}-{rope.theta:g}-{rope.factor}")
def test_tables_over_positions(rope):
    cos, sin = rotary_tables(rope, 64, 300)
    assert cos.shape == sin.shape == (300, 32)
    assert cos.dtype == sin.dtype == np.float32
    reference = rotary(rope, 64, torch.arange(300)[None], torch.float32)
    # One ULP of a frequency near 1, at position 300; where all frequencies are equal it is 2e-7.
    for table, expected in zip((cos, sin), reference, strict=True):
        np.testing.assert_allclose(table, expected[0].numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(cos**2 + sin**2, attention_factor(rope) ** 2, rtol=1e-6)


def test_values_by_hand():
    cos, sin = rotary_tables(Rope(theta=10000.0), 8, 5)
    for position in range(5):
        for i in range(4):
            angle = position * 10000.0 ** (-2 * i / 8)
            assert math.isclose(cos[position, i], math.cos(angle), abs_tol=1e-6)
            assert math.isclose(sin[position, i], math.sin(angle), abs_tol=1e-6)
    halved, _ = rotary_tables(Rope(theta=10000.0, kind="linear", factor=2.0), 8, 5)
    np.testing.assert_allclose(halved[4], cos[2], atol=1e-7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 0.1 * math.log(4.0) + 1.0),
        ({"attention_factor": 0.9}, 0.9),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4.0) + 1) / (0.05 * math.log(4.0) + 1)),
    ],
)
def test_yarn_attention_factor(given, expected):
    rope = Rope(theta=1e4, kind="yarn", factor=4.0, original_max_positions=64, beta_fast=32.0, beta_slow=1.0, **given)
    assert math.isclose(attention_factor(rope), expected)
