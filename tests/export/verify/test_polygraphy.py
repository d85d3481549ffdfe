"""Polygraphy's tools work on the graphs of a bundle with the data loader that the bundle ships."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint

pytest.importorskip("polygraphy")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("polygraphy")
    checkpoint = write_tiny_checkpoint(root / "model", layers=3)
    export_bundle(
        checkpoint,
        root / "bundle",
        ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=2), max_num_seqs=3),
    )
    return root / "bundle"


def polygraphy(bundle: Path, *words: str, ok: bool = True) -> str:
    """Run the tool in the bundle and return what it printed."""
    program = Path(sys.executable).with_name("polygraphy")
    environment = {key: value for key, value in os.environ.items() if key != "DMTD_GRAPH"}
    done = subprocess.run([program, *words], cwd=bundle, env=environment, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    return output


def test_inspect_model_lists_the_inputs(bundle: Path) -> None:
    output = polygraphy(bundle, "inspect", "model", "full_pass.onnx", "--show", "layers", "attrs")
    assert "input_ids [dtype=int64" in output
    assert "ONNX Opset: 24" in output


def test_run_with_the_bundles_data_loader(bundle: Path) -> None:
    """A graph of several slots; those of one run below, in lint and beside each other."""
    graph = "thinking.ort.batch3.onnx"
    output = polygraphy(bundle, "run", graph, "--onnxrt", "--data-loader-script", "polygraphy_data.py")
    assert "PASSED" in output


def test_lint_with_the_bundles_data_loader(bundle: Path) -> None:
    pytest.importorskip("onnx_graphsurgeon")
    output = polygraphy(bundle, "check", "lint", "late_decode.ort.onnx", "--data-loader-script", "polygraphy_data.py")
    assert "PASSED" in output
    assert "[E]" not in output


def test_both_dialects_agree_in_polygraphy(bundle: Path, tmp_path: Path) -> None:
    loader = ("--onnxrt", "--data-loader-script", "polygraphy_data.py")
    outputs = str(tmp_path / "outputs.json")
    polygraphy(bundle, "run", "full_pass.onnx", *loader, "--save-outputs", outputs)
    output = polygraphy(bundle, "run", "full_pass.ort.onnx", *loader, "--load-outputs", outputs, "--atol", "1e-4")
    assert "'logits' | Difference is within tolerance" in output
    assert "Passed: 1/1" in output


def test_the_loader_refuses_a_graph_it_does_not_know(bundle: Path) -> None:
    other = bundle / "other.onnx"
    other.write_bytes((bundle / "thinking.onnx").read_bytes())
    output = polygraphy(bundle, "run", other.name, "--onnxrt", "--data-loader-script", "polygraphy_data.py", ok=False)
    other.unlink()
    assert "name one of" in output
