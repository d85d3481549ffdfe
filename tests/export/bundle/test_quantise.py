"""Weights in blocks: what the options make of a checkpoint, held to the formats' definitions in plain Python."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from export_support import export, source_weights, stored_tensor

from dmtd_export.bundle.rounding import rounded as product_rounds
from dmtd_export.errors import ExportError
from dmtd_export.options import Target, WeightFormat, WeightOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.describe import to_json
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.bundle.speed_bound import split_bytes
from dmtd_runtime.errors import BundleError

LAYER = "model.layers.1.self_attn.q_proj"


def nearest(block: list[float], scale: float, minimum: float, bits: int) -> list[int]:
    """The nearest places on the block's grid, by exact fractions."""
    places = [round((Fraction(value) - Fraction(minimum)) / Fraction(scale)) for value in block]
    return [min(max(place, 0), 2**bits - 1) for place in places]


def rounded(block: list[float], fmt: str) -> tuple[float, float, list[int]]:
    """Scale, minimum and codes of a block: in 8 bits the largest magnitude on the first code, the middle code at zero.

    In 4 bits the range in 14, 15 or 16 steps about its middle; numpy's line through codes and values, and once more through the
    codes of that line; of the three lines that of the smallest error. Symmetric: the largest magnitude 7, 7.6, 8, 8.5 or 9 codes
    below the middle, the scale fitted to the codes, and of these that of the smallest error.
    """
    largest, errors = max(block, key=abs), {}
    if fmt == "int8":
        scale = float(np.float16(largest / -128))
        return scale, -128 * scale, nearest(block, scale, -128 * scale, 8)
    if fmt == "int4-symmetric":
        for last in (7, 7.6, 8, 8.5, 9):
            scale = largest / -last
            steps = [code - 8 for code in nearest(block, scale, -8 * scale, 4)]
            scale = sum(x * step for x, step in zip(block, steps, strict=True)) / sum(step * step for step in steps)
            errors[sum((x - scale * step) ** 2 for x, step in zip(block, steps, strict=True))] = scale
        scale = float(np.float16(errors[min(errors)]))
        return scale, -8 * scale, nearest(block, scale, -8 * scale, 4)
    for steps in (14, 15, 16):
        scale = (max(block) - min(block)) / steps
        minimum = (max(block) + min(block)) / 2 - 7.5 * scale
        for _ in range(2):
            codes = nearest(block, scale, minimum, 4)
            scale, minimum = np.polyfit(codes, block, 1)
        errors[sum((x - scale * code - minimum) ** 2 for x, code in zip(block, codes, strict=True))] = scale, minimum
    scale, minimum = (float(np.float16(number)) for number in errors[min(errors)])
    return scale, minimum, nearest(block, scale, minimum, 4)


@pytest.mark.parametrize(("fmt", "block"), [("int4", 16), ("int4", 32), ("int4-symmetric", 32), ("int8", 32)])
def test_a_stored_matrix_is_the_checkpoints_rounded(tmp_path: Path, fmt: WeightFormat, block: int) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    formats, bits = WeightOptions(weights=fmt, weights_block=block), 8 if fmt == "int8" else 4
    manifest = export(source, tmp_path / "b", formats=formats)
    weight = source_weights(source)[f"{LAYER}.weight"]
    codes = stored_tensor(tmp_path / "b", manifest, f"{LAYER}.codes")
    scales = stored_tensor(tmp_path / "b", manifest, f"{LAYER}.scales")
    assert (codes.dtype, scales.dtype) == (np.uint8, np.float16)
    assert codes.shape == (*scales.shape, block * bits // 8) and scales.shape == (len(weight), weight.shape[1] // block)
    for row, column in [(0, 0), (3, 1), (len(weight) - 1, scales.shape[1] - 1)]:
        scale, minimum, expected = rounded([float(x) for x in weight[row, column * block : (column + 1) * block]], fmt)
        got = [int(byte) for byte in codes[row, column]]
        if bits == 4:  # the lower half first
            got = [half for byte in got for half in (byte % 16, byte // 16)]
        assert (float(scales[row, column]), got) == (scale, expected)
        if fmt == "int4":
            minimums = stored_tensor(tmp_path / "b", manifest, f"{LAYER}.minimums")
            assert minimums.dtype == np.float16 and float(minimums[row, column]) == minimum
    assert manifest["quantised"][f"{LAYER}.weight"] == {
        "codes": "integer",
        "zeros": False,
        "factors": False,
        "bits": bits,
        "block": block,
        "minimums": fmt == "int4",
        "levels": 2**bits,
        "source": "search" if bits == 4 else "rtn",
    }
    assert f"{LAYER}.weight" not in manifest["weights"]
    assert "model.layers.1.input_layernorm.weight" in manifest["weights"]


def test_blocks_of_zeros_and_of_tiny_values_stay_finite() -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[1] = 1e-9  # its scale is no half-precision number but zero
    made = product_rounds(weight, 4, 32)
    assert (made.dequantised() == 0).all()


@pytest.mark.parametrize("block", [16, 64])
def test_four_bits_lose_less_than_from_end_to_end_and_hardly_more_than_the_best_grid(block: int) -> None:
    """The best grid by trying three thousand of them."""
    x = np.random.default_rng(4).standard_t(5, (60, block))
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)

    def error(scales: np.ndarray, minimums: np.ndarray) -> np.ndarray:
        scales, minimums = (a.astype(np.float16).astype(np.float64) for a in (scales, minimums))
        return ((x - minimums - scales * np.clip(np.rint((x - minimums) / scales), 0, 15)) ** 2).sum(1)

    moved = [
        (a * (high - low), b * (high - low)) for a in np.linspace(-0.05, 0.3, 60) for b in np.linspace(-0.05, 0.3, 50)
    ]
    best = np.min([error((high - b - low - a) / 15, low + a) for a, b in moved], axis=0)
    ours = ((x - product_rounds(x, 4, block).dequantised()) ** 2).sum(1)
    assert ours.sum() < 0.95 * error((high - low) / 15, low).sum()
    assert ours.sum() < 1.1 * best.sum()


def test_what_is_in_the_format_already_stays_as_it_is() -> None:
    codes = np.random.default_rng(5).integers(-8, 8, (40, 32))
    codes[:, :2] = -8, 7
    weight = codes * np.random.default_rng(6).choice([0.25, -0.5, 0.015625], (40, 1)) + 0.75
    np.testing.assert_array_equal(product_rounds(weight, 4, 32).dequantised(), weight)


def test_what_is_not_finite_shows() -> None:
    for value, symmetric in itertools.product((np.inf, np.nan), (False, True)):
        weight = np.ones((1, 64), np.float32)
        weight[0, 40] = value
        assert np.isfinite(product_rounds(weight, 4, 32, symmetric=symmetric).scales).tolist() == [[True, False]]


def test_each_group_has_its_own_format(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=3, tie=False)
    formats = WeightOptions(
        weights="int4", weights_late="int8", weights_lm_head="float", weights_embedding="int8", weights_block=16
    )
    raw = export(source, tmp_path / "b", formats=formats, encoding_layers=1, decoding_layers=1)
    bits = {name: fmt["bits"] for name, fmt in raw["quantised"].items()}
    for layer, expected in ((0, 8), (1, 4), (2, 8)):  # E, T, D
        own = {value for name, value in bits.items() if name.startswith(f"model.layers.{layer}.")}
        assert own == {expected}
    assert bits["model.embed_tokens.weight"] == 8 and "lm_head.weight" not in bits
    manifest = load_manifest(tmp_path / "b")
    shown = to_json(manifest)["weight_formats"]
    assert shown["thinking"] == "int4 in blocks of 16" and shown["lm_head"] == "float32"
    # Bytes of a group are what its tensors take: 4 bits a weight and two halves for blocks of 16, norms in float32.
    shapes = {name: value.shape for name, value in source_weights(source).items() if ".layers.1." in name}
    matrices = sum(int(np.prod(shape)) for shape in shapes.values() if len(shape) == 2)
    norms = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    assert split_bytes(manifest).thinking == matrices * 6 // 8 + 4 * norms


def test_lm_head_and_embedding_are_in_eight_bits_unless_four_are_asked_for(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2, tie=False)
    names = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
    for more, expected in (({}, [4, 8, 8]), ({"weights_lm_head": "int4"}, [4, 4, 8])):
        raw = export(source, tmp_path / "b", formats=WeightOptions(weights="int4", **more))
        assert [raw["quantised"][name]["bits"] for name in names] == expected


@pytest.mark.parametrize(
    ("target", "weights", "schema"),
    [
        ("tensorrt", None, 2),
        ("tensorrt", "int8", 2),
        ("tensorrt", "int4", 2),
        ("tensorrt", "fp8", 3),
        ("onnxruntime", None, 3),  # it has a cycle graph
    ],
)
def test_what_older_versions_do_not_know_has_a_schema_of_its_own(
    tmp_path: Path, target: Target, weights: WeightFormat | None, schema: int
) -> None:
    source = write_tiny_checkpoint(tmp_path / "c", layers=2)
    assert export(source, tmp_path / "b", target=target, formats=WeightOptions(weights=weights))["schema"] == schema


def test_the_graphs_of_onnxruntime_alone_are_made_by_default(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    raw = export(source, tmp_path / "b", formats=WeightOptions(weights="int4"))
    decoder = [graph for graph in raw["graphs"] if graph["name"] not in ("choose_token", "sample_token")]
    assert {graph["dialect"] for graph in decoder} == {"onnxruntime"}


@pytest.mark.parametrize(
    ("formats", "more", "message"),
    [
        ({"weights": "float", "weights_block": 64}, {}, r"weights_block: got 64, and no weights are int4 or int8"),
        ({"weights": "int4", "weights_block": 48}, {}, r"weights_block: got 48, expected one of 16, 32, 64, 128"),
        (
            {"weights": "int4", "weights_block": 128},
            {},
            r"weights_block: model\.embed_tokens\.weight has 64 inputs, expected",
        ),
        ({"weights": "int8", "weights_lm_head": "int4"}, {}, r"weights_lm_head: got int4 with int8 for the embedding"),
        ({"weights": "int4", "weights_lm_head": "int4"}, {}, r"weights_lm_head: got int4 with int8 for the embedding"),
        (
            {"weights_lm_head": "int8-channel"},
            {"calibration": ("text",)},
            r"weights_lm_head: got int8-channel, .*tied.*; give --weights-lm-head int8 --weights-embedding int8$",
        ),
        (
            {"weights_lm_head": "int8-channel", "weights_embedding": "int8-channel"},
            {"calibration": ("text",)},
            r"weights_embedding: got int8-channel, .*; give int8, and --weights-lm-head int8 where lm_head is tied to it$",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, formats: dict, more: dict, message: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2, tie=True)
    with pytest.raises(ExportError, match=message) as caught:
        export(source, tmp_path / "b", formats=WeightOptions(**formats), **more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


TEXT = {"num_tokens": 4096, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["weights"].pop(f"{LAYER}.scales"), "of a quantised weight is not among the weights"),
        (lambda raw: raw["quantised"][f"{LAYER}.weight"].update(block=16), "which int4 in blocks of 16"),
        (lambda raw: raw["weights"][f"{LAYER}.codes"].update(dtype="float16"), "expected uint8"),
        (lambda raw: raw["quantised"].pop(f"{LAYER}.weight"), "expected float32"),
        (lambda raw: raw["quantised"][f"{LAYER}.weight"].update(bits=5), "expected one of 4, 8"),
        (lambda raw: raw["quantised"][f"{LAYER}.weight"].update(source="\x1b[2J"), "expected the name of a format"),
        (
            lambda raw: raw["calibration"].update(weights=TEXT),
            'calibration names "weights", which nothing was measured',
        ),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, change, message: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    raw = export(source, tmp_path / "b", formats=WeightOptions(weights="int4"))
    change(raw)
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=message):
        load_manifest(tmp_path / "b")
