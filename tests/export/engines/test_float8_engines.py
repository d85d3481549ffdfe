"""Engines over floats of 8 bits: in the simulator against the oracle, and built by TensorRT-RTX, which keeps the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import load_engine_graph, quiet_logger, rtx

from dmtd_export.bundle.export import export_bundle
from dmtd_export.engines.network_check import check_network
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines
from dmtd_export.engines.weights import copy_weights
from dmtd_export.errors import ExportError
from dmtd_export.options import Dtype, ExportOptions, WeightOptions
from dmtd_export.verify import engines_hook
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import BackendError
from dmtd_runtime.bundle.manifest import load_manifest

SIZES: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 64}
RTX = BuildOptions(backend="tensorrt-rtx", **SIZES)


def make(root: Path, dtype: Dtype, **sizes: int) -> Path:
    source = write_tiny_checkpoint(root / "model", layers=3, tie=True, **sizes)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=1, cycle_length=3),
        dtype=dtype,
        max_model_len=64,
        formats=WeightOptions(weights="fp8"),
        verify=False,
    )
    export_bundle(source, root / "bundle", options)
    return root / "bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("fp8"), "bfloat16")


def test_the_simulator_computes_what_the_oracle_does(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = make(tmp_path, "float16")
    record = build_engines(made, BuildOptions(backend="simulator", **SIZES), verify=engines_hook()).record
    assert record.verification["level"] == "oracle"


def test_engines_hold_the_codes_and_nothing_wider(tmp_path: Path) -> None:
    """Wide enough that small constants do not count; the tied lm_head too, in late_decode."""
    rtx()
    made = make(tmp_path, "bfloat16", hidden_size=256, intermediate_size=1024, vocab_size=4096)
    engines = build_engines(made, RTX).record.engines
    stored = sum(info.length for info in load_manifest(made).weights.values())
    assert stored * 0.97 <= sum(engine.weight_bytes for engine in engines) <= stored * 1.03


def test_an_older_gpu_is_refused_before_anything_is_built(bundle: Path) -> None:
    rtx()
    older = BuildOptions(backend="tensorrt-rtx", compute_capability="8.6", **SIZES)
    with pytest.raises(BackendError, match=r"compute_capability: got 8\.6, weights in fp8 need 8\.9 or later"):
        build_engines(bundle, older)


def other_axis(layers: list[Any]) -> None:
    layers[0].axis = 1


def other_scales(layers: list[Any]) -> None:
    key, value = (next(x for x in layers if f"layers.1.self_attn.{kind}" in x.name) for kind in ("k_proj", "v_proj"))
    key.set_input(1, value.get_input(1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, ""),
        (other_axis, r"along axis 1, expected .* along axis 0"),
        (other_scales, r"has the scales model\.layers\.1\.self_attn\.v_proj\.scales, expected .*k_proj\.scales"),
    ],
)
def test_the_network_is_read_back(bundle: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    trt, graph = rtx(), load_engine_graph(bundle, "thinking")
    copy_weights(bundle, tmp_path, load_manifest(bundle))
    logger = quiet_logger(trt)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(graph.model.SerializeToString(), str(tmp_path / "thinking.onnx"))
    found = [network.get_layer(i) for i in range(network.num_layers)]
    found = [layer for layer in found if layer.type == trt.LayerType.DEQUANTIZE]
    for layer in found:
        layer.__class__ = trt.IDequantizeLayer
    assert found and {layer.get_input(0).dtype for layer in found} == {trt.DataType.FP8}
    if spoil is None:
        check_network(trt, network, graph, "bfloat16")
        return
    spoil(found)
    with pytest.raises(ExportError, match=message):
        check_network(trt, network, graph, "bfloat16")
