"""Quantised bundles that read their blocks otherwise than they should: what is spoiled is caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_mutations import edit_weight, edited_graph, nodes_of, reseal, set_attribute
from onnx import helper, numpy_helper
from quantised_bundles import ALL_KINDS, WEIGHT, make

from dmtd_export.verify import VerifyReport, verify_bundle
from dmtd_models.checkpoints.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Biases, a tied embedding in int4, late layers in int8; both dialects."""
    return make(tmp_path_factory.mktemp("quantised"), ALL_KINDS, family="qwen2", tie=True)


@pytest.fixture
def bundle(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "bundle"))


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def half_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``made``, in half precision."""
    return make(tmp_path_factory.mktemp(request.param), ALL_KINDS, "all", request.param, family="qwen2", tie=True)[1]


def swap_scales(tensor: np.ndarray) -> None:
    tensor[3, [0, 1]] = tensor[3, [1, 0]]


def shift_blocks(tensor: np.ndarray) -> None:
    tensor[:] = np.roll(tensor, 1, axis=1)


def swap_halves(tensor: np.ndarray) -> None:
    tensor[2, 0] = tensor[2, 0] >> 4 | tensor[2, 0] << 4


def other_zero_point(tensor: np.ndarray) -> None:
    tensor[5] = (tensor[5] + 0x11) & 0xFF


@pytest.mark.parametrize(
    ("part", "edit"),
    [("scales", swap_scales), ("codes", shift_blocks), ("codes", swap_halves), ("codes", other_zero_point)],
)
@pytest.mark.parametrize("known", ["numbers", "checkpoint"])
def test_a_quantised_weight_altered_in_place_is_named(
    made: tuple[Path, Path], bundle: Path, part: str, edit: Callable, known: str
) -> None:
    edit_weight(bundle, f"{WEIGHT}.{part}", edit, refingerprint=known == "checkpoint")
    reseal(bundle)
    if known == "numbers":
        report = verify_bundle(bundle, level="structure")
    else:
        with open_checkpoint(made[0]) as source:
            report = verify_bundle(bundle, checkpoint=source, level="structure")
    first = report.first_divergence
    assert first is not None and (first.graph, first.layer) == ("model.onnx.data", 2)
    assert WEIGHT in first.detail and (
        "of model" in first.detail if known == "numbers" else "rounded to int4" in first.detail
    )


def product(model: onnx.ModelProto, layer: int, path: str) -> onnx.NodeProto:
    """The first one, in a branch too."""
    name = f"/model/layers.{layer}/{path}/MatMulNBits"
    return next(node for node in nodes_of(model, "MatMulNBits") if node.name.endswith(name))


def add_zero_points(model: onnx.ModelProto, layer: int) -> None:
    """Others in the place of the kernel's own middle."""
    node = product(model, layer, "self_attn/o_proj")
    size = {attribute.name: attribute.i for attribute in node.attribute}
    blocks = size["K"] // 32
    zeros = np.full((size["N"], -(-blocks * size["bits"] // 8)), 0x77, np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(zeros, "spoiled_zero_points"))
    node.input.append("spoiled_zero_points")


def other_layers_scales(model: onnx.ModelProto, layer: int) -> None:
    casts = {node.output[0]: node for node in nodes_of(model, "Cast")}
    one, other = (casts[product(model, i, "self_attn/o_proj").input[2]] for i in (layer, {1: 2, 3: 0}[layer]))
    one.input[0], other.input[0] = other.input[0], one.input[0]


def other_layers_codes(model: onnx.ModelProto, layer: int) -> None:
    one, other = (product(model, i, "self_attn/o_proj") for i in (layer, {1: 2, 3: 0}[layer]))
    one.input[1], other.input[1] = other.input[1], one.input[1]


def other_layers_offsets(model: onnx.ModelProto, layer: int) -> None:
    made = {node.output[0]: node for node in model.graph.node}
    one, other = (made[made[product(model, i, "self_attn/o_proj").input[3]].input[0]] for i in (layer, 2))
    one.input[0], other.input[0] = other.input[0], one.input[0]  # of casts of minimums


def other_block_size(model: onnx.ModelProto, layer: int) -> None:
    set_attribute(product(model, layer, "mlp/down_proj"), "block_size", 64)


def no_bias(model: onnx.ModelProto, layer: int) -> None:
    del product(model, layer, "self_attn/qkv_proj").input[5]


def swapped_minimums(model: onnx.ModelProto, layer: int) -> None:
    """The other layer's, of the same shape, in the second product."""
    products = {i: f"/model/layers.{i}/self_attn/o_proj/offsets" for i in (layer, 2)}
    one, other = (next(node for node in model.graph.node if node.name == f"{products[i]}/Add") for i in products)
    one.input[0], other.input[0] = other.input[0], one.input[0]


def dequantised(model: onnx.ModelProto, layer: int) -> onnx.NodeProto:
    wanted = f"model.layers.{layer}.self_attn.o_proj.codes"
    return next(node for node in nodes_of(model, "DequantizeLinear") if node.input[0] == wanted)


def other_middle(model: onnx.ModelProto, layer: int) -> None:
    """Seven in the place of eight."""
    made = next(node for node in nodes_of(model, "ConstantOfShape") if "int4" in node.name)
    made.attribute[0].t.CopyFrom(helper.make_tensor("value", onnx.TensorProto.UINT8, [1], [7]))


def scales_of_another_layer(model: onnx.ModelProto, layer: int) -> None:
    casts = {node.output[0]: node for node in nodes_of(model, "Cast")}
    one, other = (casts[dequantised(model, i).input[1]] for i in (layer, 2))
    one.input[0], other.input[0] = other.input[0], one.input[0]


def signed_codes(model: onnx.ModelProto, layer: int) -> None:
    """Two's complements about zero: halves of bytes as they stand, read as another type."""
    node = dequantised(model, layer)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[0])
    tensor.data_type = onnx.TensorProto.INT4
    del node.input[2:]


FOUR_BITS, EIGHT_BITS = ("thinking.ort.onnx", 1), ("late_decode.ort.onnx", 3)
STANDARD = ("thinking.onnx", 1)


@pytest.mark.parametrize(
    ("place", "edit"),
    [
        (FOUR_BITS, other_layers_offsets),
        (FOUR_BITS, other_layers_scales),
        (FOUR_BITS, other_block_size),
        (EIGHT_BITS, add_zero_points),
        (EIGHT_BITS, other_layers_scales),
        (EIGHT_BITS, other_layers_codes),
        (EIGHT_BITS, other_block_size),
        (EIGHT_BITS, no_bias),
        (STANDARD, other_middle),
        (STANDARD, scales_of_another_layer),
    ],
    ids=lambda value: value.__name__ if callable(value) else value[0],
)
def test_a_product_that_reads_its_blocks_otherwise_is_caught(
    bundle: Path, place: tuple[str, int], edit: Callable[[onnx.ModelProto, int], None]
) -> None:
    file, layer = place
    with edited_graph(bundle, file) as model:
        edit(model, layer)
    reseal(bundle)
    assert verify_bundle(bundle, level="structure").ok, "the structure cannot tell"
    report: VerifyReport = verify_bundle(bundle, quick=True)
    first = report.first_divergence
    assert first is not None and first.graph == file


@pytest.mark.parametrize(
    ("layer", "edit"),
    [(1, other_layers_offsets), (3, add_zero_points), (3, other_layers_codes), (3, no_bias)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_product_in_a_branch_that_reads_its_blocks_otherwise_is_caught(
    bundle: Path, layer: int, edit: Callable[[onnx.ModelProto, int], None]
) -> None:
    """In the cycle graph: of T, and of D's first step."""
    with edited_graph(bundle, "cycle.ort.onnx") as model:
        edit(model, layer)
    reseal(bundle)
    assert verify_bundle(bundle, level="structure").ok, "the structure cannot tell"
    failed = [check for check in verify_bundle(bundle, quick=True).checks if not check.ok]
    assert all("one graph" in check.name or "in one go" in check.name for check in failed)
    assert 2e-5 in [check.margin for check in failed], "inputs that are not rounded tell"


@pytest.mark.parametrize(
    ("place", "edit"),
    [(FOUR_BITS, swapped_minimums), (FOUR_BITS, add_zero_points), (EIGHT_BITS, other_layers_codes)],
    ids=lambda value: value.__name__ if callable(value) else value[0],
)
def test_a_product_in_half_precision_that_reads_its_blocks_otherwise_is_caught(
    half_bundle: Path, tmp_path: Path, place: tuple[str, int], edit: Callable[[onnx.ModelProto, int], None]
) -> None:
    bundle, (file, layer) = Path(shutil.copytree(half_bundle, tmp_path / "bundle")), place
    with edited_graph(bundle, file) as model:
        edit(model, layer)
    reseal(bundle)
    first = verify_bundle(bundle, quick=True).first_divergence
    assert first is not None and first.graph == file


def test_codes_read_as_signed_ones_are_named(bundle: Path) -> None:
    with edited_graph(bundle, "thinking.onnx") as model:
        signed_codes(model, 1)
    reseal(bundle)
    first = verify_bundle(bundle, level="structure").first_divergence
    assert first is not None and first.graph == "thinking.onnx"
    assert "o_proj.codes: element type 22, the manifest says uint4" in first.detail
