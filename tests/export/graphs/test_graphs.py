"""The graph files: ONNX's own checks, names, no weights inside, and the same tokens from both dialects."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundle_mutations import all_nodes
from onnx import numpy_helper

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_export.verify.cycles import Case, Variant, run_variant
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions, resolve_dmtd
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import greedy
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest, load_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ExportOptions(
    split=SplitOptions(
        encoding_layers=1, decoding_layers=2, cycle_length=3, cycle_origin="absolute", prompt_input="cyclical"
    ),
    max_num_seqs=3,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("graphs") / "model", family="qwen3", layers=5, qkv_bias=True)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    export_bundle(checkpoint, checkpoint.parent / "bundle", OPTIONS)
    return checkpoint.parent / "bundle"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


def test_there_is_every_cut_in_every_layout(manifest: Manifest) -> None:
    slots = {"standard": {1}, "onnxruntime": {1, 2, 3}}
    for dialect, wanted in slots.items():
        for cut in ("full_pass", "thinking", "late_decode"):
            found = {graph.slots for graph in manifest.graphs if (graph.name, graph.dialect) == (cut, dialect)}
            assert found == ({1} if cut == "late_decode" else wanted)


def test_onnx_accepts_every_graph_in_full(bundle: Path, manifest: Manifest) -> None:
    for graph in manifest.graphs:
        onnx.checker.check_model(bundle / graph.file, full_check=True)
        model = onnx.load(bundle / graph.file, load_external_data=False)
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert model.ir_version == 10
        assert opsets == ({"": 24} if graph.dialect == "standard" else {"": 24, "com.microsoft": 1})


def test_no_weight_stands_in_a_graph(bundle: Path, manifest: Manifest) -> None:
    for graph in manifest.graphs:
        assert (bundle / graph.file).stat().st_size < 1_000_000
        for tensor in onnx.load(bundle / graph.file, load_external_data=False).graph.initializer:
            if np.prod(tensor.dims) > 16:
                assert tensor.data_location == onnx.TensorProto.EXTERNAL, tensor.name
                assert {e.value for e in tensor.external_data if e.key == "location"} == {"model.onnx.data"}


def test_node_names_keep_the_module_path_and_are_unique(bundle: Path, manifest: Manifest) -> None:
    for graph in manifest.graphs:
        if graph.name in ("choose_token", "sample_token"):
            continue
        names = [node.name for node in all_nodes(onnx.load(bundle / graph.file, load_external_data=False).graph)]
        assert len(set(names)) == len(names)
        wanted = {
            "full_pass": {"": {0, 1, 2, 3, 4}},
            "thinking": {"": {0, 1, 2}},
            "late_decode": {"": {0, 3, 4}},
            "cycle": {"/thinking": {0, 1, 2}, "/waiting": {0}, "/step0": {3, 4}, "/step1": {0, 3, 4}},
        }
        for branch, layers in wanted[graph.name].items():
            module = re.compile(rf"{branch}/model/layers\.(\d+)/self_attn/o_proj/Gemm")
            assert {int(found.group(1)) for name in names if (found := module.fullmatch(name))} == layers
            assert f"{branch}/model/layers.{min(layers)}/mlp/down_proj/Gemm" in names


# Inputs by place that ONNX Runtime's CUDA kernels read in host memory.
READ_ON_HOST = {
    "GroupQueryAttention": {6},
    "Reshape": {1},
    "Expand": {1},
    "Split": {1},
    "Squeeze": {1},
    "Unsqueeze": {1},
    "Slice": {1, 2, 3, 4},
    "ReduceSum": {1},
    "CumSum": {1},
    "TopK": {1},
    "Range": {0, 1, 2},
}
# What ONNX Runtime's CUDA provider runs through cuDNN: reductions other than sums, convolutions, pools, recurrences.
NEEDS_CUDNN = (
    *("ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"),
    *("ReduceSumSquare", "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "LRN"),
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "LSTM", "GRU", "RNN", "Dropout"),
)


def test_a_branch_that_no_run_takes_keeps_the_weights_of_the_others(bundle: Path, manifest: Manifest) -> None:
    """Else ONNX Runtime lets go of those that it packs, and allocates every tensor of a branch anew in every run."""
    graphs = [graph for graph in manifest.graphs if graph.name == "cycle"]
    assert graphs
    for graph in graphs:
        model = onnx.load(bundle / graph.file, load_external_data=False)
        outer = {name for node in model.graph.node for name in node.output} | {t.name for t in model.graph.initializer}
        nodes = [node for node in all_nodes(model.graph) if node.op_type in ("Gemm", "MatMulNBits")]
        read = {name for node in nodes for name in node.input[1:]} & outer
        [kept] = [node for node in all_nodes(model.graph) if node.op_type == "SequenceConstruct"]
        assert read == set(kept.input) and len(read) >= 4 * manifest.model.num_layers
        [never] = [node for node in model.graph.node if node.op_type == "Less"]
        zero = next(t for t in model.graph.initializer if t.name == never.input[1])
        assert never.input[0] == "num_steps" and numpy_helper.to_array(zero).tolist() == [0]


def test_an_input_is_read_on_the_host_or_on_the_device_and_never_on_both(bundle: Path, manifest: Manifest) -> None:
    """A value that is bound on the host reaches a kernel on a GPU once, when it is bound; on the host nodes read it anew."""
    lengths = 0
    for graph in manifest.graphs:
        if graph.name == "cycle":  # which no GPU runs
            continue
        model = onnx.load(bundle / graph.file, load_external_data=False)
        for info in graph.inputs:
            at = [
                (node.op_type, place in READ_ON_HOST.get(node.op_type, ()))
                for node in model.graph.node
                for place, name in enumerate(node.input)
                if name == info.name
            ]
            on_host = {host for _, host in at}
            assert at and len(on_host) == 1, f"{graph.file}, {info.name}: read by {at}"
            assert on_host == {"total_sequence_length" in info.name}, f"{graph.file}, {info.name}: read by {at}"
            lengths += on_host == {True}
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":  # straight in: what a node makes of it lies on the device
                assert node.input[6] in {info.name for info in graph.inputs}
    assert lengths


def test_no_weight_is_read_on_the_host(bundle: Path, manifest: Manifest) -> None:
    """On a GPU they are shared where they lie on the device, and a kernel that reads one on the host would read its address."""
    for graph in manifest.graphs:
        for node in onnx.load(bundle / graph.file, load_external_data=False).graph.node:
            read = {node.input[place] for place in READ_ON_HOST.get(node.op_type, ()) if place < len(node.input)}
            assert not read & set(graph.weights), f"{graph.file}: {node.name}"


def test_no_graph_needs_cudnn(bundle: Path, manifest: Manifest) -> None:
    for graph in manifest.graphs:
        ops = {node.op_type for node in onnx.load(bundle / graph.file, load_external_data=False).graph.node}
        assert ops, graph.file
        assert not ops & set(NEEDS_CUDNN), graph.file


def test_weights_of_a_graph_are_listed_and_found_by_their_parts(bundle: Path, manifest: Manifest) -> None:
    for graph in manifest.graphs:
        model = onnx.load(bundle / graph.file, load_external_data=False)
        external = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
        assert set(graph.weights) == set(external)
        for name, tensor in external.items():
            place = {entry.key: entry.value for entry in tensor.external_data}
            parts = [manifest.weights[part] for part in contract.stack_parts(name)]
            assert parts[0].offset == int(place["offset"])
            assert sum(part.length for part in parts) == int(place["length"])
            assert contract.stack_name(contract.stack_parts(name)) == name


def test_stacked_weights_are_one_initializer_over_neighbours(bundle: Path, manifest: Manifest) -> None:
    model = onnx.load(bundle / "full_pass.ort.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    prefix = "model.layers.3.self_attn"
    stacked = tensors[f"{prefix}.q_proj.weight+k_proj+v_proj"]
    parts = [manifest.weights[f"{prefix}.{kind}_proj.weight"] for kind in "qkv"]
    assert list(stacked.dims) == [(4 + 2 + 2) * 16, 64]
    assert [part.offset for part in parts[1:]] == [part.offset + part.length for part in parts[:2]]
    place = {entry.key: entry.value for entry in stacked.external_data}
    assert int(place["offset"]) == parts[0].offset
    assert int(place["length"]) == sum(part.length for part in parts)
    from_file = np.memmap(
        bundle / "model.onnx.data", np.float32, "r", offset=parts[0].offset, shape=tuple(stacked.dims)
    )
    with open_checkpoint(bundle.parent / "model") as source:
        np.testing.assert_array_equal(
            from_file, np.concatenate([source.read(f"{prefix}.{kind}_proj.weight") for kind in "qkv"])
        )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("full_pass", ["staged", "fused"])
def test_both_dialects_choose_the_oracles_tokens(
    checkpoint: Path, bundle: Path, manifest: Manifest, full_pass: str, plain: bool
) -> None:
    prompt = (5, 17, 99, 3, 42)
    with open_checkpoint(checkpoint) as source:
        spec = resolve_dmtd(
            source.config,
            source.dmtd,
            SplitOptions(
                encoding_layers=1, decoding_layers=2, cycle_length=3, cycle_origin="absolute", prompt_input="cyclical"
            ),
        )
        model = DmtdModel.from_reader(source.config, spec, source.read, torch.float32)
    wanted = greedy(model, prompt, 8, plain)
    case = Case(prompt=prompt, plain=plain, num_new=8)
    for dialect in ("standard", "onnxruntime"):
        variant = Variant(dialect=dialect, full_pass=full_pass, batch=1, chunk=4)
        (ran,) = run_variant(bundle, manifest, variant, [case])
        assert tuple(ran.logits.argmax(-1).tolist()) == wanted.token_ids
        np.testing.assert_allclose(
            ran.logits, wanted.logits.numpy(), rtol=0, atol=2e-5 * wanted.logits.abs().max().item()
        )
