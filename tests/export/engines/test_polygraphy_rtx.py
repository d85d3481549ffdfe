"""Polygraphy with TensorRT-RTX on engine graphs (`dmtd build --backend simulator`), as far as it goes without a GPU.

A bundle's own graphs have caches of any capacity, which TensorRT refuses; the simulator fixes it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_support import rtx

from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines

pytest.importorskip("polygraphy")
LOADER = ("--data-loader-script", "polygraphy_data.py")


@pytest.fixture(scope="module")
def engines(bundles: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rtx()
    bundle = tmp_path_factory.mktemp("polygraphy") / "bundle"
    shutil.copytree(bundles(family="qwen3", encoding=0, tie=True, dtype="float16"), bundle)
    return build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64)).directory


def polygraphy(directory: Path, *words: str) -> str:
    """Run the tool with TensorRT-RTX and return what it printed."""
    program = Path(sys.executable).with_name("polygraphy")
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run(
        [program, *words], cwd=directory, env=environment, capture_output=True, text=True, timeout=600
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def test_run_with_the_data_loader(engines: Path) -> None:
    assert "PASSED" in polygraphy(engines, "run", "late_decode.onnx", "--onnxrt", *LOADER)


def test_inspect_capability_finds_nothing_unsupported(engines: Path, tmp_path: Path) -> None:
    output = polygraphy(engines, "inspect", "capability", "late_decode.onnx", "-o", str(tmp_path / "parts"))
    assert "Graph is fully supported" in output


def test_convert_writes_an_engine(engines: Path, tmp_path: Path) -> None:
    target = tmp_path / "late_decode.engine"
    polygraphy(
        engines, "convert", "late_decode.onnx", "--convert-to", "trt", "--strongly-typed", *LOADER, "-o", str(target)
    )
    assert target.stat().st_size > 150_000  # the layer and the tables of the rotation are in it
