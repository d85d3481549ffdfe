"""Half-precision bundles: held to the oracle as their float32 cast, and run as they are within a margin in ULP.

MEASURED, worst over all graphs, float16 in ONNX Runtime / bfloat16 in ONNX's evaluator, in ULP at the largest value:
7 layers of the seeded tiny model 4.0 / 5.6 (margin 15.9), 30 layers of SmolLM2's shape with random weights 13 / not run
(margin 32.9); top-1 agreement 84 of 84 and 107 of 108 rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundle_mutations import edit_weight, edited_graph, nodes_of, reseal, set_attribute

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_export.verify import VerifyReport, verify_bundle
from dmtd_export.verify.half import float32_twin
from dmtd_export.verify.margins import half_margin
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import load_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 4


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def checkpoint_and_bundle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp(request.param)
    model = write_tiny_checkpoint(root / "model", layers=LAYERS)
    options = ExportOptions(
        split=SplitOptions(encoding_layers=1, decoding_layers=1, cycle_length=2), max_num_seqs=2, dtype=request.param
    )
    export_bundle(model, root / "bundle", options)
    return model, root / "bundle"


@pytest.fixture(scope="module")
def report(checkpoint_and_bundle: tuple[Path, Path]) -> VerifyReport:
    checkpoint, bundle = checkpoint_and_bundle
    with open_checkpoint(checkpoint) as source:
        return verify_bundle(bundle, checkpoint=source)


def checks_with(report: VerifyReport, words: str) -> list[Any]:
    return [check for check in report.checks if words in check.name]


def test_a_half_bundle_passes_at_the_highest_level(
    checkpoint_and_bundle: tuple[Path, Path], report: VerifyReport
) -> None:
    _, bundle = checkpoint_and_bundle
    dtype = load_manifest(bundle).model.dtype
    assert report.ok, report.first_divergence
    assert report.level == "oracle"
    decoder = [graph for graph in load_manifest(bundle).graphs if graph.name not in ("choose_token", "sample_token")]
    assert len(checks_with(report, "cast to float32")) == len(decoder)
    assert all(check.margin == 2e-5 for check in checks_with(report, "cast to float32"))
    as_is = [check for check in report.checks if "as it is" in check.name]
    assert len(as_is) == (len(decoder) + 1 if dtype == "float16" else 3)
    limit = half_margin(dtype, LAYERS).limit
    assert all(check.margin == limit for check in as_is)
    # Head-room, and proof that the half types were really run: float32 would stay far below one ULP.
    assert 0.3 < max(check.worst for check in as_is) < limit / 1.5
    assert any(dtype in note for note in report.notes)
    # Whole cycles do not run in the evaluator, which bfloat16 needs.
    agreement = ["top-1 agreement" in check.detail for check in checks_with(report, "float16 as it is")]
    assert agreement == ([True] if dtype == "float16" else [])


@pytest.mark.usefixtures("report")
def test_nothing_is_left_beside_the_bundle(checkpoint_and_bundle: tuple[Path, Path]) -> None:
    _, bundle = checkpoint_and_bundle
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "model"]


def test_the_float32_twin_holds_the_same_values(checkpoint_and_bundle: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = checkpoint_and_bundle
    manifest = load_manifest(bundle)
    twin = float32_twin(bundle, manifest, tmp_path, None)
    assert twin.model.dtype == "float32"
    for graph in twin.graphs:
        onnx.checker.check_model(tmp_path / graph.file, full_check=True)
        assert {info.dtype for info in (*graph.inputs, *graph.outputs)} <= {"float32", "int64", "int32", "bool"}
    original = onnx.load(bundle / "full_pass.ort.onnx")
    widened = onnx.load(tmp_path / "full_pass.ort.onnx")
    for half, full in zip(original.graph.initializer, widened.graph.initializer, strict=True):
        a, b = onnx.numpy_helper.to_array(half), onnx.numpy_helper.to_array(full)
        np.testing.assert_array_equal(a.astype(b.dtype), b, err_msg=half.name)


@pytest.mark.parametrize("file", ["thinking.onnx", "full_pass.ort.onnx"])
def test_an_edited_half_graph_is_caught_by_its_cast(
    checkpoint_and_bundle: tuple[Path, Path], tmp_path: Path, file: str
) -> None:
    import shutil

    bundle = Path(shutil.copytree(checkpoint_and_bundle[1], tmp_path / "bundle"))
    with edited_graph(bundle, file) as model:
        for node in nodes_of(model, "Attention" if file == "thinking.onnx" else "GroupQueryAttention"):
            if "layers.1/" in node.name:
                set_attribute(node, "scale", 0.2495)  # the right one is 0.25: far below the half types' rounding
    reseal(bundle)
    first = verify_bundle(bundle, quick=True).first_divergence
    assert first is not None
    assert (first.graph, first.layer) == (file, 2)


def test_an_altered_half_weight_is_named(checkpoint_and_bundle: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    bundle = Path(shutil.copytree(checkpoint_and_bundle[1], tmp_path / "bundle"))
    edit_weight(bundle, "model.layers.1.mlp.gate_proj.weight", lambda tensor: tensor.__setitem__((0, 0), 1.0))
    reseal(bundle)
    first = verify_bundle(bundle, level="structure").first_divergence
    assert first is not None
    assert first.layer == 1
    assert "gate_proj" in first.detail
