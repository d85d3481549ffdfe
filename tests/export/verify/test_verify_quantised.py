"""Quantised bundles: held to the oracle over an independent reading of their weights, and run as they are within a margin.

MEASURED, the worst over all graphs and cycles as a share of the largest value, inputs rounded to int8: 5 layers of the seeded
tiny models 0.064 (margin 0.117), SmolLM2-135M's 30 layers see dmtd_export/README.md; inputs not rounded: 2e-6 (margin 2e-5).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from quantised_bundles import ALL_KINDS, LAYERS, WEIGHT, make

from dmtd_export.options import Dtype, WeightOptions
from dmtd_export.verify import VerifyReport, verify_bundle
from dmtd_export.verify.exact import exact_twin
from dmtd_export.verify.graph_checks import compare
from dmtd_export.verify.graph_runs import open_onnxruntime, run_graph
from dmtd_export.verify.margins import FLOAT32, half_margin, int8_margin
from dmtd_export.verify.scenario import make_scenario
from dmtd_export.verify.stored import stored_weight
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.ort.library import import_onnxruntime

pytestmark = pytest.mark.usefixtures("one_thread")

HALF_MARGINS = {"half_ulp", "half_top1_agreement"}
INT8_MARGINS = {"int8_of_max", "int8_top1_agreement"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Biases, a tied embedding in int4, late layers in int8; both dialects."""
    return make(tmp_path_factory.mktemp("quantised"), ALL_KINDS, family="qwen2", tie=True)


def test_a_quantised_bundle_passes_at_the_highest_level(made: tuple[Path, Path]) -> None:
    checkpoint, bundle = made
    with open_checkpoint(checkpoint) as source:
        report = verify_bundle(bundle, checkpoint=source, quick=True)
    assert report.ok, report.first_divergence
    assert report.level == "oracle"
    exact = [check for check in report.checks if "inputs not rounded" in check.name]
    as_is = [check for check in report.checks if "as it is" in check.name]
    # thinking, full_pass for 1 and 2; late_decode; the three of the standard dialect
    assert len(exact) == 8 and {check.margin for check in exact} == {2e-5}
    plain = [check for check in report.checks if "not optimised" in check.name]
    assert [check.name.split(",")[0] for check in plain] == ["thinking.onnx", "late_decode.onnx", "full_pass.onnx"]
    assert {check.margin for check in plain} == {2e-5}
    limit = int8_margin(LAYERS).limit
    assert len(as_is) == 6 and {check.margin for check in as_is} == {limit}
    # Head-room, and proof that inputs were really rounded: float32 would stay far below.
    assert 1e-3 < max(check.worst or 0.0 for check in as_is) < limit / 1.5
    cycles = [check for check in as_is if "whole cycles" in check.name]
    assert len(cycles) == 3, "staged, and the cycle graph with one sequence and several"
    for check in cycles:
        assert "top-1 agreement" in check.detail and "KL" in check.detail and "perplexity" in check.detail
    assert report.margins == {"float32_of_max": 2e-5, "int8_of_max": limit, "int8_top1_agreement": 0.75}
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "model"]


@pytest.mark.parametrize(
    ("weights", "family", "tie"), [("int8", "qwen3", False), ("int8", "qwen2", True), ("int4-symmetric", "llama", True)]
)
def test_blocks_without_minimums_pass(weights: str, family: str, tie: bool, tmp_path: Path) -> None:
    """Their products take what attention gives: in a graph of one sequence nothing stands between the two."""
    _, bundle = make(tmp_path, WeightOptions(weights=weights), "onnxruntime", family=family, tie=tie)
    report = verify_bundle(bundle, quick=True)
    assert report.ok, report.first_divergence
    for slots, late_views in (("", 0), (".batch2", 2)):  # D of several sequences, a layer
        nodes = onnx.load(bundle / f"full_pass.ort{slots}.onnx", load_external_data=False).graph.node
        views = [n for n in nodes if "/self_attn/" in n.name and n.op_type in ("Reshape", "Unsqueeze", "Squeeze")]
        of_norms = [n for n in views if n.name.endswith(("_heads/Reshape", "_merge/Reshape"))]
        assert len(of_norms) == 4 * LAYERS * (family == "qwen3")
        assert len(views) - len(of_norms) == late_views


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_standard_graphs_alone_round_no_inputs(tmp_path: Path, dtype: Dtype) -> None:
    """An untied lm_head in int8. In half precision within its ULP, and cast to float32 within float32's margin."""
    formats = WeightOptions(weights="int4", weights_lm_head="int8")
    _, bundle = make(tmp_path, formats, "tensorrt", dtype, family="qwen3", tie=False)
    report = verify_bundle(bundle, quick=True)
    assert report.ok, report.first_divergence
    assert report.level == "oracle"
    assert report.margins.keys() == {"float32_of_max", *({} if dtype == "float32" else HALF_MARGINS)}
    exact = [check for check in report.checks if check.margin == 2e-5 and check.name.startswith("thinking.onnx")]
    assert len(exact) == 2 and max(check.worst for check in exact) < 1e-5  # with optimisations, and without


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def half_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``made``, in half precision."""
    return make(tmp_path_factory.mktemp(request.param), ALL_KINDS, "all", request.param, family="qwen2", tie=True)[1]


def test_a_quantised_bundle_in_half_precision_passes_at_the_highest_level(half_bundle: Path) -> None:
    """MEASURED, ONNX Runtime's own graphs in float16, inputs not rounded: 4.9 ULP; standard ones: 6.8, in bfloat16 7.9."""
    dtype, report = load_manifest(half_bundle).model.dtype, verify_bundle(half_bundle, quick=True)
    assert report.ok, report.first_divergence
    assert report.level == "oracle"
    named = partial(checks_with, report)
    cast = named(", cast to float32, inputs not rounded,")
    assert len(cast) == 8 and {check.margin for check in cast} == {2e-5}
    assert len(named("not optimised")) == 3
    half, int8 = half_margin(dtype, LAYERS).limit, int8_margin(LAYERS).limit
    if dtype == "bfloat16":  # no kernels on the CPU: standard graphs in ONNX's evaluator, the others as their cast
        assert [check.margin for check in named("as it is")] == [half] * 3
        assert report.margins.keys() == {"float32_of_max", *HALF_MARGINS}
        return
    assert sorted(check.margin for check in named("as it is")) == sorted([half] * 3 + [int8] * 4)
    exact = named("in float16, inputs not rounded")
    assert len(exact) == 3 and {check.margin for check in exact} == {half}
    assert 0.3 < max(check.worst for check in exact) < half / 1.5, "float16 was really run, and there is room"
    assert report.margins.keys() == {"float32_of_max", *HALF_MARGINS, *INT8_MARGINS}
    assert sorted(path.name for path in half_bundle.parent.iterdir()) == ["bundle", "model"]


def checks_with(report: VerifyReport, words: str) -> list:
    return [check for check in report.checks if words in check.name]


def test_what_half_precision_does_not_store_is_computed_in_float32(half_bundle: Path) -> None:
    """Offsets, from scales and minimums: ONNX Runtime folds them, with the CPU's kernels, which know float32 alone."""
    model = onnx.load(half_bundle / "late_decode.ort.onnx", load_external_data=False)
    half = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
    made = {node.output[0]: node for node in model.graph.node}
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    sums = [node for node in model.graph.node if node.name.endswith("/offsets/Add")]
    assert sums
    for node in sums:
        (reader,) = [other for other in model.graph.node if node.output[0] in other.input]
        assert (reader.op_type, reader.attribute[0].i) == ("Cast", half[load_manifest(half_bundle).model.dtype])
        minimums, scales = made[node.input[0]], made[made[node.input[1]].input[0]]
        assert all(cast.attribute[0].i == onnx.TensorProto.FLOAT for cast in (minimums, scales))
        assert {kinds[minimums.input[0]], kinds[scales.input[0]]} == {onnx.TensorProto.FLOAT16}  # as they are stored


def test_both_dialects_read_the_same_bytes(made: tuple[Path, Path]) -> None:
    """The one as packed bytes, the other as a matrix of the integers in them."""
    read = {}
    for file in ("late_decode.ort.onnx", "late_decode.onnx"):
        model = onnx.load(made[1] / file, load_external_data=False)
        codes = {tensor.name: tensor for tensor in model.graph.initializer if ".codes" in tensor.name}
        read[file] = set()
        for tensor in codes.values():
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "model.onnx.data"
            read[file] |= set(range(int(place["offset"]), int(place["offset"]) + int(place["length"])))
    assert read["late_decode.ort.onnx"] == read["late_decode.onnx"] != set()
    tied, down = codes["model.embed_tokens.codes"], codes["model.layers.3.mlp.down_proj.codes"]
    assert (tied.data_type, list(tied.dims)) == (onnx.TensorProto.UINT4, [128, 64])
    assert (down.data_type, list(down.dims)) == (onnx.TensorProto.UINT8, [64, 96])


@pytest.mark.parametrize(
    "name", [f"{WEIGHT}.weight", "model.layers.3.self_attn.k_proj.weight", "model.embed_tokens.weight"]
)
def test_the_reading_of_weights_is_the_kernels_own(made: tuple[Path, Path], name: str) -> None:
    """A product of the identity matrix gives the weights as ONNX Runtime reads them."""
    bundle, manifest = made[1], load_manifest(made[1])
    fmt, (rows, columns) = manifest.quantised[name], manifest.shape_of(name)
    raw = [(bundle / "model.onnx.data").read_bytes()[i.offset : i.offset + i.length] for i in parts(manifest, name)]
    codes = np.frombuffer(raw[0], np.uint8).reshape(rows, columns // fmt.block, -1)
    scales = np.frombuffer(raw[1], np.float16).astype(np.float32).reshape(rows, -1)
    attrs = {"N": rows, "K": columns, "bits": fmt.bits, "block_size": fmt.block, "accuracy_level": 0}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attrs)
    graph = helper.make_graph(
        [node],
        "identity",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
    expected = got.T
    if fmt.minimums:  # a sum over inputs of the kernel's products, and of what blocks add to every weight
        minimums = np.frombuffer(raw[2], np.float16).astype(np.float32).reshape(rows, -1)
        expected = expected + np.repeat(minimums + 8 * scales, fmt.block, axis=1)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(stored_weight(bundle, manifest, name), expected, rtol=1e-6, atol=1e-6 * largest)


def parts(manifest, name: str) -> list:
    return [manifest.weights[part] for part in manifest.parts_of(name)]


def test_the_twin_over_floats_computes_what_the_kernel_does(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Products over 8 bits: our formula over floats against ONNX Runtime's own reading of the blocks, which is slow."""
    bundle, manifest = made[1], load_manifest(made[1])
    graph = manifest.graph("late_decode", "onnxruntime")
    scenario = make_scenario(manifest.model.vocab_size)
    thought = np.random.default_rng(3).standard_normal((*scenario.ids.shape, manifest.model.hidden_size))
    outcomes = []
    for name, in_floats in (("floats", True), ("kernel", False)):
        (tmp_path / name).mkdir()
        twin = exact_twin(bundle, manifest, tmp_path / name, in_floats=in_floats)
        nodes = onnx.load(tmp_path / name / graph.file, load_external_data=False).graph.node
        kinds = [node.op_type for node in nodes]
        # Two layers of four products in 8 bits; lm_head is in 4, and its kernel's in both.
        assert (kinds.count("FusedMatMul"), kinds.count("MatMulNBits")) == ((8, 1) if in_floats else (0, 9))
        found = twin.graph("late_decode", "onnxruntime")
        run = run_graph(
            tmp_path / name / graph.file, found, twin.cycle, scenario, thought, partial(open_onnxruntime, prepack=True)
        )
        outcomes.append(run)
    floats, kernel = outcomes
    check = compare("twins", graph, scenario, kernel, floats, "graphs", FLOAT32)
    assert check.ok and check.cases > 0, check.detail
