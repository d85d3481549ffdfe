"""Blocks whose minimums are zero points, as AWQ and asymmetric GPTQ have them: products take the zero points themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_mutations import all_nodes, edited_graph, nodes_of, reseal
from onnx import helper, numpy_helper
from packed_files import NAME, Packed, awq, gptq
from safetensors.numpy import load_file

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_export.verify import verify_bundle
from dmtd_export.verify.graph_runs import mapped
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.ort.library import import_onnxruntime

pytestmark = pytest.mark.usefixtures("one_thread")

THINKING = "thinking.ort.onnx"
OPTIONS = ExportOptions(
    split=SplitOptions(decoding_layers=1, cycle_length=2),
    max_num_seqs=2,
    max_model_len=64,
    formats=WeightOptions(weights="keep"),
    target="all",
)


def make(root: Path, pack: Callable, settings: dict, **blocks: object) -> tuple[Packed, Path]:
    packed = Packed(root / "model", pack, settings, **blocks)
    export_bundle(packed.directory, root / "bundle", OPTIONS)
    return packed, root / "bundle"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Path]:
    return make(tmp_path_factory.mktemp("awq"), awq, {"quant_method": "awq", "bits": 4, "version": "gemm"})


@pytest.fixture
def bundle(made: tuple[Packed, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "bundle"))


def test_a_bundle_with_zero_points_passes_at_the_highest_level(made: tuple[Packed, Path]) -> None:
    packed, bundle = made
    with open_checkpoint(packed.directory) as source:
        report = verify_bundle(bundle, checkpoint=source, quick=True)
    assert report.ok, report.first_divergence
    assert report.level == "oracle"
    formats = load_manifest(bundle).quantised
    assert set(formats) == set(packed.values)
    assert all(fmt.zeros and fmt.minimums for fmt in formats.values())


def test_nothing_stands_beside_a_product_with_zero_points(made: tuple[Packed, Path]) -> None:
    for file in (THINKING, "late_decode.ort.onnx", "full_pass.ort.batch2.onnx", "cycle.ort.onnx"):
        model = onnx.load(made[1] / file, load_external_data=False)
        assert all(len(node.input) == 4 and node.input[3] for node in nodes_of(model, "MatMulNBits"))
        assert all(node.op_type != "ReduceSum" for node in all_nodes(model.graph))


@pytest.mark.parametrize("module", ["self_attn/o_proj", "mlp/down_proj"])  # of two blocks, and of three: a half is left
def test_the_zero_points_are_the_checkpoints_own(made: tuple[Packed, Path], module: str) -> None:
    """What a session folds, against the numbers that were packed into ``qzeros``."""
    packed, bundle = made
    model = onnx.load(bundle / THINKING, load_external_data=False)
    name = f"model.layers.0.{module.replace('/', '.')}"
    product = next(n for n in nodes_of(model, "MatMulNBits") if n.name == f"/model/layers.0/{module}/MatMulNBits")
    nodes, wanted = [], {product.input[3]}
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            nodes.insert(0, node)
            wanted |= set(node.input)
    stored = [
        numpy_helper.from_array(np.array(mapped(t, bundle) if t.external_data else numpy_helper.to_array(t)), t.name)
        for t in model.graph.initializer
        if t.name in wanted
    ]
    output = helper.make_tensor_value_info(product.input[3], onnx.TensorProto.UINT8, None)
    graph = helper.make_graph(nodes, "zeros", [], [output], stored)
    alone = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    (got,) = (
        import_onnxruntime()
        .InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        .run(None, {})
    )
    zeros = packed.zeros[f"{name}.weight"]
    assert len(np.unique(zeros)) == 16, "every code is some block's zero"
    expected = [
        [sum(int(z) << 4 * half for half, z in enumerate(row[i : i + 2])) for i in range(0, len(row), 2)]
        for row in zeros
    ]
    assert got.tolist() == expected


def test_two_bits_stand_about_the_middle_of_four(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"}
    _, bundle = make(tmp_path, lambda *args: gptq(*args, v2=True), settings, bits=2)
    formats = load_manifest(bundle).quantised.values()
    assert {(fmt.bits, fmt.levels, fmt.zeros) for fmt in formats} == {(4, 4, True)}
    report = verify_bundle(bundle, quick=True)
    assert report.ok, report.first_divergence


def test_a_block_whose_scale_is_zero_has_a_zero_point_all_the_same(tmp_path: Path) -> None:
    """Its values are zeros whatever it is; the matrix keeps its products."""
    packed = Packed(tmp_path / "model", awq, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    scales = load_file(packed.file)[f"{NAME}.scales"]
    scales[0, 0] = 0
    packed.edit(scales=scales)
    export_bundle(packed.directory, tmp_path / "bundle", OPTIONS)
    assert load_manifest(tmp_path / "bundle").quantised[f"{NAME}.weight"].zeros
    report = verify_bundle(tmp_path / "bundle", quick=True)
    assert report.ok, report.first_divergence


def other_zero(model: onnx.ModelProto) -> None:
    """One more in every block of a product."""
    node = next(node for node in nodes_of(model, "Sub") if "/layers.0/mlp/down_proj/zeros" in node.name)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "spoiled_middle"))
    node.input[0] = "spoiled_middle"


def swapped_halves(model: onnx.ModelProto) -> None:
    lower, upper = (n for n in nodes_of(model, "Slice") if "/layers.0/self_attn/o_proj/zeros" in n.name)
    lower.input[1], upper.input[1] = upper.input[1], lower.input[1]


def no_zero_points(model: onnx.ModelProto) -> None:
    node = next(n for n in nodes_of(model, "MatMulNBits") if "/layers.0/self_attn/qkv_proj" in n.name)
    del node.input[3]


@pytest.mark.parametrize("edit", [other_zero, swapped_halves, no_zero_points], ids=lambda edit: edit.__name__)
def test_other_zero_points_are_caught(bundle: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    with edited_graph(bundle, THINKING) as model:
        edit(model)
    reseal(bundle)
    report = verify_bundle(bundle, quick=True)
    first = report.first_divergence
    assert first is not None and first.graph == THINKING
