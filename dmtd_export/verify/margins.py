"""How close is close enough: the margins of a verification, and the one comparison that all its numeric checks use.

float32: the largest difference, as a share of the largest magnitude in the expected tensor. Half precision: the same
difference in units in the last place (ULP) of the type at that magnitude. Inputs rounded to int8: a share of the largest
again. Tokens: equal, unless the expected top two are closer than the margin (a near-tie, counted and shown).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import Dialect
from dmtd_runtime.bundle.manifest import Manifest

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT32_MARGIN = 2e-5  # of the largest |value|
# In whole cycles, whose rows have passed through caches, it grows with depth about as its root: over SmolLM2's 30 layers 1.2e-5
# to 1.4e-5 of the largest logit was measured, and 2.2e-5 once.
FLOAT32_LAYERS = 16
# A rotary angle is a float32 product of the position: one ULP of the frequency and one of the product, a position.
ROTARY_ERROR_A_POSITION = 3e-7
# Half precision against float32, in ULP of the type at the largest |value|. Rounding grows with depth about as its
# root: see MEASURED in tests/export/verify/test_verify_half.py.
HALF_ULP_AT_DEPTH_ONE = 6.0
HALF_TOP1_AGREEMENT = 0.9
# Products that round their inputs to int8, a scale for each block of a row, against the same weights without. A block's step
# is 1/127 of its largest value, an error uniform within half a step is 1/440 of it at root mean square, and the largest of 32
# normal values is about 2.3 times their root mean square: 0.5% of a product's own size, which no width averages out because the
# sum's size grows alike. Errors of layers add as their squares do. The worst factor is what logits showed above that. In larger
# blocks more values share the largest one: in blocks of 32, 64 and 128 it is 4.1, 5.5 and 7.4 times the root mean square of the
# inputs of SmolLM2's products, random tokens or text, so errors grow as the block to the power of 0.42.
INT8_PRODUCT_ERROR = 2.3 / 440
INT8_GROWTH = 0.42
INT8_WORST = 10.0
INT8_TOP1_AGREEMENT = 0.75  # random tokens have many near-ties: 0.88 to 1 was measured
# Where a whole row has one scale (int8-channel), its largest value is about 7 times their root mean square on SmolLM2, inputs'
# factors applied: 4.9 to 10.5 in the median of a layer's four products.
INT8_ROW_ERROR = 7 / 440
INT8_ROW_TOP1_AGREEMENT = 0.6  # 0.73 to 0.91 was measured
MANTISSA_BITS = {"float16": 10, "bfloat16": 7}


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """``limit`` in ``unit``; ``ulp_bits`` are the explicit mantissa bits where the unit is ULP.

    ``agreement``: the least share of many rows that choose the same token, where roundings may change some; None: all choose it.
    """

    limit: float
    unit: str
    ulp_bits: int | None = None
    agreement: float | None = None

    def least_agreement(self, rows: int) -> float:
        """The least share of so few rows: two standard errors of their number below that of many."""
        least = self.agreement or 0.0
        return least - 2 * math.sqrt(least * (1 - least) / rows)

    def scale(self, largest: float) -> float:
        """What one unit is worth in a tensor whose largest magnitude is ``largest``."""
        if not largest > 0:
            return 1.0
        return largest if self.ulp_bits is None else 2.0 ** (math.floor(math.log2(largest)) - self.ulp_bits)


FLOAT32 = Margin(limit=FLOAT32_MARGIN, unit="of max")


def float32_margin(num_layers: int) -> Margin:
    """The margin of whole cycles through ``num_layers`` layers in float32."""
    return Margin(limit=FLOAT32_MARGIN * max(1.0, num_layers / FLOAT32_LAYERS) ** 0.5, unit=FLOAT32.unit)


def half_margin(dtype: str, num_layers: int) -> Margin:
    """The margin of a half-precision graph of ``num_layers`` layers against the same weights in float32."""
    limit = HALF_ULP_AT_DEPTH_ONE * max(1.0, num_layers) ** 0.5
    return Margin(limit=limit, unit=f"ULP of {dtype}", ulp_bits=MANTISSA_BITS[dtype], agreement=HALF_TOP1_AGREEMENT)


def int8_margin(num_layers: int, *, block: int = 32, by_row: bool = False) -> Margin:
    """The margin of a graph of ``num_layers`` layers whose products round their inputs to int8, against one that does not.

    ``block``: the largest one. ``by_row``: some have one scale for a whole row.
    """
    error, agreement = INT8_PRODUCT_ERROR * max(1.0, block / 32) ** INT8_GROWTH, INT8_TOP1_AGREEMENT
    if by_row:
        error, agreement = max(error, INT8_ROW_ERROR), INT8_ROW_TOP1_AGREEMENT
    return Margin(limit=INT8_WORST * error * max(1.0, num_layers) ** 0.5, unit="of max", agreement=agreement)


def int8_margin_of(manifest: Manifest) -> Margin:
    """The margin of a bundle's graphs whose products round their inputs to int8."""
    formats = manifest.quantised.values()
    block = max((fmt.block for fmt in formats if not fmt.factors), default=1)
    return int8_margin(manifest.model.num_layers, block=block, by_row=any(fmt.factors for fmt in formats))


def rounds_inputs(manifest: Manifest, dialect: Dialect | None = None) -> bool:
    """Whether graphs, those of ``dialect`` or any, round the inputs of products to int8: ONNX Runtime's own over blocks do."""
    dialects = {dialect} if dialect else {graph.dialect for graph in manifest.decoder_graphs}
    return bool(manifest.quantised) and contract.ONNXRUNTIME in dialects


def rounding_margin(manifest: Manifest, dialect: Dialect | None = None, device: str = "cpu") -> Margin | None:
    """The widest margin of the graphs as they are, those of ``dialect`` or all; None where they round nothing: float32's holds.

    On the CPU alone inputs of products are rounded to int8. That outweighs half precision, a tenth of it added as squares.
    """
    model = manifest.model
    if device == "cpu" and rounds_inputs(manifest, dialect):
        return int8_margin_of(manifest)
    return None if model.dtype == "float32" else half_margin(model.dtype, model.num_layers)


def told_margins(*margins: Margin | None) -> dict[str, float]:
    """What a report says of the margins of rounding: limits and least agreement, by what is rounded."""
    told: dict[str, float] = {}
    for margin in margins:
        if margin is not None:
            kind = "int8_of_max" if margin.ulp_bits is None else "half_ulp"
            told |= {kind: margin.limit, f"{kind.partition('_')[0]}_top1_agreement": margin.agreement or 0.0}
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The worst element of a comparison: ``error`` in the margin's unit, where, and both values."""

    error: float
    index: tuple[int, ...]
    expected: float
    got: float


def worst_difference(expected: Array, got: Array, margin: Margin, largest: float | None = None) -> Difference:
    """The worst element of two arrays of one shape; a NaN counts as infinitely wrong.

    ``largest`` overrides the largest magnitude (say, of the whole tensor that ``expected`` is a slice of).
    """
    assert expected.shape == got.shape, f"shapes differ: expected {expected.shape}, got {got.shape}"
    if expected.size == 0:
        return Difference(error=0.0, index=(), expected=0.0, got=0.0)
    wide, other = expected.astype(np.float32), got.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(wide - other)
    apart = np.where(np.isnan(apart), np.inf, apart)
    index = np.unravel_index(int(apart.argmax()), apart.shape)
    size = float(np.abs(wide).max()) if largest is None else largest
    return Difference(
        error=float(apart[index]) / margin.scale(size),
        index=tuple(int(i) for i in index),
        expected=float(wide[index]),
        got=float(other[index]),
    )


def log_softmax(row: Array) -> Array:
    """Logarithms of a row's probabilities, float64."""
    wide = row.astype(np.float64)
    wide -= wide.max()
    result: Array = wide - np.log(np.exp(wide).sum())
    return result


def top_two_gap(row: Array) -> float:
    """How far the best logit of a row [vocab] stands above the second."""
    if row.size < 2:
        return math.inf
    second, first = np.partition(row, row.size - 2)[-2:]
    return float(first - second)
