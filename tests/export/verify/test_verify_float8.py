"""Weights as floats of 8 bits, a scale for each output: rounded to the nearest, read alike by three dequantisers, verified.

MEASURED, 4 layers of the seeded tiny model: float32 1.6e-6 of the largest (margin 2e-5), float16 3.9 ULP, bfloat16 in ONNX's
evaluator 4.0 (margin 12).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from bundle_mutations import edit_weight, edited_graph, nodes_of, reseal

from dmtd_export.bundle.export import export_bundle
from dmtd_export.bundle.rounding import rounded_to_float8
from dmtd_export.errors import ExportError
from dmtd_export.options import Dtype, ExportOptions, WeightOptions
from dmtd_export.verify import verify_bundle
from dmtd_export.verify.margins import half_margin
from dmtd_export.verify.stored import float8, stored_weight
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.bundle.tables import table_parts

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 4  # E1 T2 D1
TABLE, DOWN = "model.embed_tokens.weight", "model.layers.2.mlp.down_proj"
BYTES = np.arange(256, dtype=np.uint8)
FINITE = (BYTES & 0x7F) != 0x7F


def options(dtype: Dtype = "float32", **more: object) -> ExportOptions:
    split = SplitOptions(encoding_layers=1, decoding_layers=1, cycle_length=2)
    formats = WeightOptions(weights="fp8")
    return ExportOptions(split=split, dtype=dtype, max_model_len=64, formats=formats, verify=False, **more)


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = write_tiny_checkpoint(root / "model", layers=LAYERS, family="qwen2", tie=True)
    export_bundle(checkpoint, root / "bundle", options(request.param))
    return checkpoint, root / "bundle"


@pytest.fixture
def bundle(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "bundle"))


def test_it_passes_at_the_highest_level(made: tuple[Path, Path]) -> None:
    with open_checkpoint(made[0]) as source:
        report = verify_bundle(made[1], checkpoint=source, quick=True)
    assert report.ok, report.first_divergence
    assert report.level == "oracle"
    manifest = load_manifest(made[1])
    assert {graph.dialect for graph in manifest.graphs} == {"standard"}, "fp8 alone asks for these"
    assert {fmt.name for fmt in manifest.quantised.values()} == {"fp8 with a scale for each output"}
    exact = [check for check in report.checks if check.margin == 2e-5 and ".onnx" in check.name]
    assert len(exact) == 6 and max(check.worst for check in exact) < 1e-5  # with optimisations, and without
    if (dtype := manifest.model.dtype) != "float32":
        as_is = [check for check in report.checks if check.margin == half_margin(dtype, LAYERS).limit]
        assert len(as_is) == (4 if dtype == "float16" else 3) and max(check.worst for check in as_is) < 6


def test_every_byte_has_the_value_of_its_type() -> None:
    np.testing.assert_array_equal(float8(BYTES)[FINITE], BYTES.view(ml_dtypes.float8_e4m3fn)[FINITE].astype(np.float32))


def test_values_are_rounded_to_the_nearest() -> None:
    """Held to all values that a row's scale can make; the largest magnitude stands on the last, or half a step beside it."""
    rng = np.random.default_rng(7)
    weight = (rng.standard_normal((5, 96)) * np.float32([[1e-3], [1], [300], [1e-9], [0]])).astype(np.float32)
    found = rounded_to_float8(weight)
    assert (found.scales > 0).all() and found.scales.shape == (5, 1)
    np.testing.assert_array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))
    values = np.unique(BYTES.view(ml_dtypes.float8_e4m3fn)[FINITE].astype(np.float32))
    for row, scale, got in zip(weight, found.scales[:, 0], found.dequantised(), strict=True):
        grid = values * scale
        best = np.abs(row[:, None] - grid).min(-1)
        np.testing.assert_allclose(np.abs(row - got), best, rtol=1e-5, atol=1e-6 * float(scale))
    # A scale that half precision holds with few digits puts the largest magnitude a little off.
    np.testing.assert_allclose(np.abs(found.dequantised()[:3]).max(-1), np.abs(weight[:3]).max(-1), rtol=6e-3)


def test_three_readers_agree(made: tuple[Path, Path]) -> None:
    """The oracle's, the runtime's table for a device, and what was written."""
    manifest = load_manifest(made[1])
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(manifest.model.dtype, manifest.model.dtype)
    stored = stored_weight(made[1], manifest, TABLE)
    table = np.concatenate([*table_parts(made[1], manifest, TABLE)]).view(dtype).reshape(stored.shape)
    np.testing.assert_array_equal(table.astype(np.float32), stored.astype(dtype).astype(np.float32))
    with open_checkpoint(made[0]) as source:
        np.testing.assert_array_equal(stored, rounded_to_float8(source.read(TABLE)).dequantised())


def other_scales(model: onnx.ModelProto) -> None:
    casts = {node.output[0]: node for node in nodes_of(model, "Cast")}
    nodes = [maker(model, layer) for layer in (1, 2)]
    (one, i), (other, j) = ((casts[node.input[1]], 0) if node.input[1] in casts else (node, 1) for node in nodes)
    one.input[i], other.input[j] = other.input[j], one.input[i]


def one_scale_for_all(model: onnx.ModelProto) -> None:
    """The other axis: 64 outputs, 64 inputs."""
    maker(model, 1).attribute[0].i = 1


def maker(model: onnx.ModelProto, layer: int) -> onnx.NodeProto:
    wanted = f"model.layers.{layer}.self_attn.o_proj.codes"
    return next(node for node in nodes_of(model, "DequantizeLinear") if node.input[0] == wanted)


@pytest.mark.parametrize("edit", [other_scales, one_scale_for_all])
def test_graphs_that_read_them_otherwise_are_caught(bundle: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    with edited_graph(bundle, "thinking.onnx") as model:
        edit(model)
    reseal(bundle)
    assert verify_bundle(bundle, level="structure").ok, "the structure cannot tell"
    first = verify_bundle(bundle, quick=True).first_divergence
    assert first is not None and first.graph == "thinking.onnx"


def test_a_code_that_is_not_the_nearest_is_named(made: tuple[Path, Path], bundle: Path) -> None:
    def other_code(tensor: np.ndarray) -> None:
        tensor[3, 0, 5] = 1.0 if tensor[3, 0, 5] < 0 else -1.0

    edit_weight(bundle, f"{DOWN}.codes", other_code, refingerprint=True)
    reseal(bundle)
    with open_checkpoint(made[0]) as source:
        first = verify_bundle(bundle, checkpoint=source, level="structure").first_divergence
    assert first is not None and f"{DOWN}.weight[3, 5] is not the checkpoint's value rounded to fp8" in first.detail


@pytest.mark.parametrize("target", ["onnxruntime", "all"])
def test_onnx_runtimes_own_graphs_are_refused(tmp_path: Path, target: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=LAYERS)
    with pytest.raises(ExportError, match=rf"target: got {target} with weights in fp8, expected tensorrt"):
        export_bundle(source, tmp_path / "b", options(target=target))
    assert not (tmp_path / "b").exists()
