"""What the tests of engines share: tiny bundles by family and E, and the skip where TensorRT-RTX's wheel is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmtd_export.bundle.export import export_bundle
from dmtd_export.bundle.spec import graph_spec
from dmtd_export.graphs.engine import EngineGraph, engine_graph
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import load_manifest
from study import smollm2

CAPACITY = 320
SMOLLM2_CACHE = smollm2.default_cache_dir()  # now, before a fixture gives the tests a cache directory of their own


def rtx() -> Any:
    """The library, or a skip."""
    return pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX's wheel: pip install 'dmtd[tensorrt-rtx]'")


def quiet_logger(trt: Any) -> Any:
    """TensorRT's logger that says nothing: what a parser refuses is in its errors."""

    class Quiet(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            pass

    return Quiet()


def make_bundle(
    directory: Path,
    *,
    family: str = "qwen3",
    encoding: int = 0,
    tie: bool = False,
    head_dim: int = 16,
    **options: Any,
) -> Path:
    """Four layers of random weights: E ``encoding``, T the rest, D 1, cycle of 3, up to 64 tokens, standard graphs only."""
    source = write_tiny_checkpoint(
        directory / "model", family=family, layers=4, tie=tie, qkv_bias=family == "qwen2", head_dim=head_dim
    )
    settings: dict[str, Any] = {"dtype": "float16", "target": "tensorrt", "max_model_len": 64}
    export_bundle(
        source,
        directory / "bundle",
        ExportOptions(
            split=SplitOptions(
                encoding_layers=encoding, thinking_layers=3 - encoding, decoding_layers=1, cycle_length=3
            ),
            **settings | options,
        ),
    )
    return directory / "bundle"


def load_engine_graph(bundle: Path, name: contract.GraphName, capacity: int = CAPACITY) -> EngineGraph:
    return engine_graph(graph_spec(bundle, load_manifest(bundle)), name, capacity)
