"""Weights in blocks: what the options make of a checkpoint, held to the formats' definitions in plain Python."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from export_support import export, source_weights, stored_tensor

from dmtd_export.bundle.quantise import round_to_nearest
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import preview
from dmtd_export.errors import ExportError
from dmtd_export.options import WeightOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.describe import to_json
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.bundle.speed_bound import split_bytes
from dmtd_runtime.errors import BundleError

LAYER = "model.layers.1.self_attn.q_proj"


def rounded(block: list[float], bits: int) -> tuple[float, list[int]]:
    """Scale and codes of a block by exact fractions: the largest magnitude on the last code, the others to the nearest."""
    middle = 2 ** (bits - 1)
    scale = float(np.float16(max(block, key=abs) / -middle))
    if scale == 0:
        return 0.0, [middle] * len(block)
    steps = [round(Fraction(value) / Fraction(scale)) for value in block]
    return scale, [min(max(step, -middle), middle - 1) + middle for step in steps]


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 32)])
def test_a_stored_matrix_is_the_checkpoints_rounded_to_nearest(tmp_path: Path, bits: int, block: int) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    formats = WeightOptions(weights="int4" if bits == 4 else "int8", weights_block=block)
    manifest = export(source, tmp_path / "b", formats=formats)
    weight = source_weights(source)[f"{LAYER}.weight"]
    codes = stored_tensor(tmp_path / "b", manifest, f"{LAYER}.codes")
    scales = stored_tensor(tmp_path / "b", manifest, f"{LAYER}.scales")
    assert (codes.dtype, scales.dtype) == (np.uint8, np.float16)
    assert codes.shape == (*scales.shape, block * bits // 8) and scales.shape == (len(weight), weight.shape[1] // block)
    for row, column in [(0, 0), (3, 1), (len(weight) - 1, scales.shape[1] - 1)]:
        scale, expected = rounded([float(x) for x in weight[row, column * block : (column + 1) * block]], bits)
        got = [int(byte) for byte in codes[row, column]]
        if bits == 4:  # the lower half first
            got = [half for byte in got for half in (byte % 16, byte // 16)]
        assert (float(scales[row, column]), got) == (scale, expected)
    assert manifest["quantised"][f"{LAYER}.weight"] == {
        "bits": bits,
        "block": block,
        "minimums": False,
        "levels": 2**bits,
        "source": "rtn",
    }
    assert f"{LAYER}.weight" not in manifest["weights"]
    assert "model.layers.1.input_layernorm.weight" in manifest["weights"]


def test_blocks_of_zeros_and_of_tiny_values_stay_finite() -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[1] = 1e-9  # its scale is no half-precision number but zero
    made = round_to_nearest(weight, 4, 32)
    assert (made.dequantised() == 0).all()


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
    assert shown["thinking"] == "int4 in blocks of 16 (rtn)" and shown["lm_head"] == "float32"
    # Bytes of a group are what its tensors take: 4.5 + 0.5 bits a weight in blocks of 16, norms in float32.
    shapes = {name: value.shape for name, value in source_weights(source).items() if ".layers.1." in name}
    matrices = sum(int(np.prod(shape)) for shape in shapes.values() if len(shape) == 2)
    norms = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    assert split_bytes(manifest).thinking == matrices * 5 // 8 + 4 * norms


def test_the_graphs_of_onnxruntime_alone_are_made(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    raw = export(source, tmp_path / "b", formats=WeightOptions(weights="int4"))
    decoder = [graph for graph in raw["graphs"] if graph["name"] not in ("choose_token", "sample_token")]
    assert {graph["dialect"] for graph in decoder} == {"onnxruntime"}


def test_engines_take_no_quantised_weights_and_say_so(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    export(source, tmp_path / "b", formats=WeightOptions(weights="int4"))
    with pytest.raises(ExportError, match=r"weights are quantised, engines take float .* --weights float --target all"):
        preview(tmp_path / "b", BuildOptions(backend="simulator", max_model_len=64))


@pytest.mark.parametrize(
    ("formats", "more", "message"),
    [
        ({"weights": "int4", "weights_block": 48}, {}, r"weights_block: got 48, expected one of 16, 32, 64, 128"),
        (
            {"weights": "int4", "weights_block": 128},
            {},
            r"weights_block: model\.embed_tokens\.weight has 64 inputs, expected",
        ),
        ({"weights": "int4"}, {"target": "tensorrt"}, r"target: got tensorrt, expected onnxruntime"),
        ({"weights_thinking": "int8"}, {"target": "all"}, r"target: got all, expected onnxruntime"),
        ({"weights": "int4"}, {"dtype": "float16"}, r"dtype: got float16, expected float32"),
        ({"weights": "int4", "weights_lm_head": "int8"}, {}, r"weights_lm_head: got int8 with int4 for the embedding"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, formats: dict, more: dict, message: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2, tie=True)
    with pytest.raises(ExportError, match=message) as caught:
        export(source, tmp_path / "b", formats=WeightOptions(**formats), **more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["weights"].pop(f"{LAYER}.scales"), "of a quantised weight is not among the weights"),
        (lambda raw: raw["quantised"][f"{LAYER}.weight"].update(block=16), "which int4 in blocks of 16"),
        (lambda raw: raw["weights"][f"{LAYER}.codes"].update(dtype="float16"), "expected uint8"),
        (lambda raw: raw["quantised"].pop(f"{LAYER}.weight"), "expected float32"),
        (lambda raw: raw["quantised"][f"{LAYER}.weight"].update(bits=5), "expected one of 4, 8"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, change, message: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    raw = export(source, tmp_path / "b", formats=WeightOptions(weights="int4"))
    change(raw)
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=message):
        load_manifest(tmp_path / "b")
