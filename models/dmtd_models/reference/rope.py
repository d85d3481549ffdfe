"""Rotary tables in numpy, for the exporter, which has no torch. Half-split ("rotate_half") form, true positions.

The PyTorch reference follows transformers' float32 operations; this follows them too, with the one difference that the
power is taken in float64 and rounded once. Measured against torch 2.13 over usual bases and head sizes, at most one
inverse frequency in 64 differs, by one ULP; a test holds it there.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dmtd_models.config.rope import Rope, yarn_factor

FloatArray = npt.NDArray[np.float32]


def rotary_tables(rope: Rope, head_dim: int, max_positions: int) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines of every position's angles, yarn's attention factor applied.

    Returns:
        (cos, sin), each float32 [max_positions, head_dim // 2]; column i turns elements i and i + head_dim // 2.
    """
    positions = np.arange(max_positions, dtype=np.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    scale = np.float32(attention_factor(rope))
    # The angle is a float32 as in transformers; its cosine is rounded once, from float64.
    exact = angles.astype(np.float64)
    cos = np.cos(exact).astype(np.float32) * scale
    sin = np.sin(exact).astype(np.float32) * scale
    return cos, sin


def inverse_frequencies(rope: Rope, head_dim: int) -> FloatArray:
    """The angle that one position adds, float32 [head_dim // 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.power(np.float64(np.float32(rope.theta)), exponents.astype(np.float64)).astype(np.float32)
    base: FloatArray = np.float32(1.0) / periods
    if rope.kind == "default":
        return base
    factor = np.float32(_present(rope.factor))
    if rope.kind == "linear":
        divided: FloatArray = (base / factor).astype(np.float32)
        return divided
    if rope.kind == "llama3":
        return _llama3(rope, base)
    low, high = yarn_range(rope, head_dim)
    width = np.float32(high - low)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / width, 0, 1)
    kept = np.float32(1.0) - ramp
    stretched = np.float32(1.0) / (factor * periods)
    mixed: FloatArray = (stretched * (np.float32(1.0) - kept) + base * kept).astype(np.float32)
    return mixed


def attention_factor(rope: Rope) -> float:
    """What yarn multiplies cos and sin by; 1 for every other kind."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _present(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return yarn_factor(factor, rope.mscale) / yarn_factor(factor, rope.mscale_all_dim)
    return yarn_factor(factor)


def yarn_range(rope: Rope, head_dim: int) -> tuple[float, float]:
    """First and last frequency index of yarn's ramp from unscaled to scaled."""
    beta_fast, beta_slow = _present(rope.beta_fast), _present(rope.beta_slow)
    original = _present(rope.original_max_positions)

    def index_of(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = index_of(beta_fast), index_of(beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def _llama3(rope: Rope, base: FloatArray) -> FloatArray:
    """Long waves are stretched by the factor, short ones kept, those between interpolated."""
    low, high, factor = _present(rope.low_freq_factor), _present(rope.high_freq_factor), _present(rope.factor)
    original = _present(rope.original_max_positions)
    # torch divides a number by a tensor as a product with the reciprocal; the last bits follow from that.
    one = np.float32(1.0)
    wavelength = (one / base) * np.float32(2 * math.pi)
    smooth = ((one / wavelength) * np.float32(original) - np.float32(low)) / np.float32(high - low)
    between = (one - smooth) * base / np.float32(factor) + smooth * base
    result = np.where(wavelength > np.float32(original / low), base / np.float32(factor), base)
    medium = (wavelength >= np.float32(original / high)) & (wavelength <= np.float32(original / low))
    return np.where(medium, between, result).astype(np.float32)


def _present(value: float | None) -> float:
    assert value is not None, "config.read_config fills every parameter that the kind of rope reads"
    return value
