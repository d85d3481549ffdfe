"""The parsed network is read back: each rule of the module fails on a graph that breaks it, parsed by the real library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_support import load_engine_graph, quiet_logger, rtx
from onnx import helper

from dmtd_export.engines.network_check import NetworkFacts, check_attention_nodes, check_network, prepare_attention
from dmtd_export.errors import ExportError
from dmtd_export.graphs.engine import EngineGraph
from dmtd_runtime.bundle.manifest import TensorInfo


@pytest.fixture
def graph(bundles: Callable[..., Path]) -> EngineGraph:
    return load_engine_graph(bundles(family="qwen3", encoding=0, tie=True, dtype="float16"), "late_decode")


@pytest.fixture
def check(bundles: Callable[..., Path]) -> Callable[..., NetworkFacts]:
    """Parse ``model`` (by default the graph's own) with TensorRT-RTX and check what came of it."""
    trt = rtx()
    weights = bundles(family="qwen3", encoding=0, tie=True, dtype="float16")

    def run(
        graph: EngineGraph,
        model: onnx.ModelProto | None = None,
        *,
        bundle: Path = weights,
        dtype: str = "float16",
        spoil: Callable[[Any, Any], None] = lambda trt, network: None,
    ) -> NetworkFacts:
        logger = quiet_logger(trt)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse((model or graph.model).SerializeToString(), str(bundle / "late_decode.onnx"))
        assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
        spoil(trt, network)
        return check_network(trt, network, graph, dtype)

    return run


def altered(graph: EngineGraph, change: Callable[[onnx.NodeProto], None], op: str = "Attention") -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for node in model.graph.node:
        if node.op_type == op:
            change(node)
    return model


def with_model(graph: EngineGraph, model: onnx.ModelProto, **changes: Any) -> EngineGraph:
    fields = {name: getattr(graph, name) for name in ("name", "inputs", "outputs", "tables", "aliases")}
    return EngineGraph(**fields | changes, model=model)


@pytest.mark.parametrize("name", ["thinking", "late_decode", "full_pass"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("family", "encoding"), [(f, e) for f in ("qwen3", "qwen2", "llama") for e in (0, 2)])
def test_our_graphs_pass(
    bundles: Callable[..., Path], check: Callable[..., NetworkFacts], family: str, encoding: int, dtype: str, name: str
) -> None:
    bundle = bundles(family=family, encoding=encoding, tie=family == "qwen3", dtype=dtype)
    facts = check(load_engine_graph(bundle, name), bundle=bundle, dtype=dtype)
    layers = {"thinking": 3, "late_decode": 1 + encoding, "full_pass": 4}[name]
    assert (facts.attentions, facts.cache_updates) == (layers, 2 * layers)


def test_constants_are_all_weights_but_the_table(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64 + 2 * 64 + 2 * 16  # q, k, v, o, MLP, norms, q and k norms
    rotary = 2 * (64 + 256) * 8
    facts = check(graph)
    assert 0 <= facts.constant_bytes - 2 * (layer + 64 + rotary) < 1000  # small constants of the graph


# Rule 1: what the parser drops or reads otherwise, each of them accepted by it without a word.


def test_is_causal_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    def causal(node: onnx.NodeProto) -> None:
        del node.input[3:]
        node.attribute.append(helper.make_attribute("is_causal", 1))

    model = altered(graph, causal)
    with pytest.raises(ExportError, match=r"self_attn/Attention: got has is_causal"):
        check(with_model(graph, model))
    with pytest.raises(ExportError, match=r"got is causal \(CausalMaskKind.UPPER_LEFT\)"):  # wrong over a past
        check(graph, model)


def test_nonpad_kv_seqlen_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    model = altered(graph, lambda node: node.input.extend(["", "", "late_write_indices"]))
    with pytest.raises(ExportError, match=r"got reads late_write_indices, expected query, key, value and mask only"):
        check(with_model(graph, model))
    assert check(graph, model).attentions == 1  # in the network nothing is left of it: only the graph can tell


def test_a_window_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    model = altered(graph, lambda node: node.attribute.append(helper.make_attribute("left_window_size", 8)))
    with pytest.raises(ExportError, match=r"got has left_window_size"):
        check(with_model(graph, model))


def test_a_missing_mask_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    def unmasked(node: onnx.NodeProto) -> None:
        del node.input[3:]

    model = altered(graph, unmasked)
    with pytest.raises(ExportError, match=r"Attention: got has no mask, expected an explicit boolean mask"):
        check_attention_nodes(model)
    with pytest.raises(ExportError, match=r"Attention: got has no mask, expected the graph's"):
        check(graph, model)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_a_scale_that_the_parser_would_round_is_refused(
    graph: EngineGraph, check: Callable[..., NetworkFacts], scale: float | None
) -> None:
    def scaled(node: onnx.NodeProto) -> None:
        del node.attribute[:]
        if scale is not None:
            node.attribute.append(helper.make_attribute("scale", scale))

    model = altered(graph, scaled)
    got = "no scale" if scale is None else "a scale of 0.25"
    with pytest.raises(ExportError, match=rf"Attention: got {got}, which TensorRT would round .*, expected 1; "):
        check(with_model(graph, model))
    with pytest.raises(ExportError, match=r"Attention: got reads queries from \(Unnamed"):
        check(graph, model)


# Rules 2 to 8: the graph promises one thing, the network does another.


def test_a_dropped_input_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    more = (*graph.inputs, TensorInfo(name="gate_extra", dims=("batch",), dtype="bool"))
    with pytest.raises(ExportError, match="input gate_extra: got was dropped by the parser"):
        check(with_model(graph, graph.model, inputs=more))


def test_an_added_output_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    with pytest.raises(ExportError, match=r"output logits: got was added"):
        check(with_model(graph, graph.model, outputs=tuple(o for o in graph.outputs if o.name != "logits")))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logits", {"dtype": "float16"}, "output logits: got is FLOAT, expected float16"),
        ("thought", {"dtype": "float32"}, "input thought: got is HALF, expected float32"),
        ("embedding_table", {"dims": (64, 128)}, r"input embedding_table: got has the shape \(128, 64\)"),
    ],
)
def test_other_types_and_shapes_are_refused(
    graph: EngineGraph, check: Callable[..., NetworkFacts], name: str, change: dict[str, Any], message: str
) -> None:
    def edit(infos: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(**{"name": i.name, "dims": i.dims, "dtype": i.dtype} | (change if i.name == name else {}))
            for i in infos
        )

    with pytest.raises(ExportError, match=message):
        check(with_model(graph, graph.model, inputs=edit(graph.inputs), outputs=edit(graph.outputs)))


def attention(trt: Any, network: Any) -> Any:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    [layer] = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    layer.__class__ = trt.IAttentionInputLayer
    return layer.attention


def test_lengths_of_attentions_own_are_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    def spoil(trt: Any, network: Any) -> None:
        attention(trt, network).key_value_lengths = network.add_input("lengths", trt.int32, [-1])

    more = (*graph.inputs, TensorInfo(name="lengths", dims=("batch",), dtype="int32"))
    with pytest.raises(ExportError, match="has lengths of its own"):
        check(with_model(graph, graph.model, inputs=more), spoil=spoil)


def test_caches_that_change_places_are_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    swap = {"past_key_values.3.key": "past_key_values.3.value", "past_key_values.3.value": "past_key_values.3.key"}

    def swapped(node: onnx.NodeProto) -> None:
        node.input[0] = swap[node.input[0]]

    with pytest.raises(ExportError, match=r"got comes from past_key_values.3.value, expected a KV update of past_key"):
        check(graph, altered(graph, swapped, "TensorScatter"))


def test_a_cache_update_of_another_kind_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    """A cache that is concatenated or copied is a network of the same inputs and outputs, but not in place."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for node in model.graph.node:
        if node.output[0] == "present.3.value":
            node.CopyFrom(helper.make_node("Identity", ["past_key_values.3.value"], ["present.3.value"], name="copy"))
    with pytest.raises(ExportError, match=r"present.3.value: got comes from no KV update"):
        check(graph, model)


def test_a_table_that_stayed_a_constant_is_refused(
    bundles: Callable[..., Path], graph: EngineGraph, check: Callable[..., NetworkFacts]
) -> None:
    bundle = bundles(family="qwen3", encoding=0, tie=True, dtype="float16")
    [table] = [
        item
        for item in onnx.load(bundle / "late_decode.onnx", load_external_data=False).graph.initializer
        if item.name == "model.embed_tokens.weight"
    ]

    def head(node: onnx.NodeProto) -> None:
        if node.name == "/lm_head/Gemm":
            node.input[1] = table.name

    model = altered(graph, head, "Gemm")
    model.graph.initializer.append(table)
    inputs = tuple(info for info in graph.inputs if info.name != "lm_head_table")
    [unused] = [value for value in model.graph.input if value.name == "lm_head_table"]
    model.graph.input.remove(unused)
    with pytest.raises(
        ExportError, match=r"model.embed_tokens.weight: got is a constant, expected a table as an input"
    ):
        check(with_model(graph, model, inputs=inputs))


def test_another_type_than_asked_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    with pytest.raises(ExportError, match="self_attn/Attention: got reads HALF, expected bfloat16"):
        check(graph, dtype="bfloat16")


def test_a_norm_in_half_precision_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    """The sum of squares of a norm that is not cast, and does not ask for float32."""
    model = altered(graph, lambda node: None)
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    model.graph.initializer.append(helper.make_tensor("ones_half", onnx.TensorProto.FLOAT16, [64], [1.0] * 64))
    norm = next(node for node in model.graph.node if node.name == "/model/norm/RMSNormalization")
    norm.input[0], norm.input[1] = casts[norm.input[0]].input[0], "ones_half"
    norm.attribute.append(helper.make_attribute("stash_type", int(onnx.TensorProto.FLOAT16)))
    with pytest.raises(ExportError, match="computes in HALF, expected float32"):
        check(with_model(graph, model))


def test_an_interleaved_rotation_is_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    def turn(node: onnx.NodeProto) -> None:
        node.attribute.append(helper.make_attribute("interleaved", 1))

    with pytest.raises(ExportError, match="interleaved True, expected halves of whole heads"):
        check(graph, altered(graph, turn, "RotaryEmbedding"))


# Rule 8: keys and values are the cache's, to the last bit.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_keys_are_not_scaled_at_head_dim_128(
    bundles: Callable[..., Path], check: Callable[..., NetworkFacts], family: str, dtype: str
) -> None:
    """What is left of the parser's own scaling is a product of keys and exactly 1."""
    bundle = bundles(family=family, dtype=dtype, head_dim=128)
    factors: list[float] = []

    def look(trt: Any, network: Any) -> None:
        layers = {network.get_layer(i).get_output(0).name: network.get_layer(i) for i in range(network.num_layers)}
        product = layers[attention(trt, network).get_input(1).name]
        assert product.type == trt.LayerType.ELEMENTWISE
        assert product.get_input(0).name == "present.3.key/visible"
        constant = layers[layers[product.get_input(1).name].get_input(0).name]
        constant.__class__ = trt.IConstantLayer
        factors.extend(constant.weights.ravel().tolist())

    assert check(load_engine_graph(bundle, "late_decode"), bundle=bundle, dtype=dtype, spoil=look).attentions == 1
    assert factors == [1.0]


def times(trt: Any, network: Any, tensor: Any, factor: float) -> Any:
    constant = network.add_constant((1, 1, 1, 1), np.array([[[[factor]]]], np.float16)).get_output(0)
    return network.add_elementwise(tensor, constant, trt.ElementWiseOperation.PROD).get_output(0)


@pytest.mark.parametrize(("index", "what"), [(0, "queries"), (1, "keys"), (2, "values")])
@pytest.mark.parametrize("factor", [0.5, 1 + 2**-10, -1.0])
def test_what_attention_reads_is_scaled_by_nothing_but_1(
    graph: EngineGraph, check: Callable[..., NetworkFacts], index: int, what: str, factor: float
) -> None:
    def scale(trt: Any, network: Any, factor: float) -> None:
        layer = attention(trt, network)
        assert layer.set_input(index, times(trt, network, layer.get_input(index), factor))

    with pytest.raises(ExportError, match=rf"self_attn/Attention: got reads {what} from .*times exactly 1"):
        check(graph, spoil=lambda trt, network: scale(trt, network, factor))
    assert check(graph, spoil=lambda trt, network: scale(trt, network, 1.0)).attentions == 1


def test_products_by_1_are_taken_out_before_the_build(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    seen: list[list[str]] = []

    def prepare(trt: Any, network: Any) -> None:
        for _ in range(2):  # what is there no more is not missed
            prepare_attention(trt, network)
            layer = attention(trt, network)
            assert layer.decomposable
            seen.append([layer.get_input(i).name for i in range(3)])

    check(graph, spoil=prepare)
    query = next(node.input[0] for node in graph.model.graph.node if node.op_type == "Attention")
    assert seen == [[query, "present.3.key/visible", "present.3.value/visible"]] * 2


@pytest.mark.parametrize("operation", ["SUM", "DIV"])
def test_another_operation_with_1_is_no_product(
    graph: EngineGraph, check: Callable[..., NetworkFacts], operation: str
) -> None:
    def spoil(trt: Any, network: Any) -> None:
        layer = attention(trt, network)
        one = network.add_constant((1, 1, 1, 1), np.ones((1, 1, 1, 1), np.float16)).get_output(0)
        made = network.add_elementwise(layer.get_input(1), one, getattr(trt.ElementWiseOperation, operation))
        layer.set_input(1, made.get_output(0))

    with pytest.raises(ExportError, match="reads keys from"):
        check(graph, spoil=spoil)


def test_keys_from_another_cache_are_refused(graph: EngineGraph, check: Callable[..., NetworkFacts]) -> None:
    """The cache as it was before the update, and the other half of the pair."""

    def before(node: onnx.NodeProto) -> None:
        if node.input[0] == "present.3.key":
            node.input[0] = "past_key_values.3.key"

    with pytest.raises(ExportError, match="got reads keys of no KV update"):
        check(graph, altered(graph, before, "Slice"))

    def values(trt: Any, network: Any) -> None:
        layer = attention(trt, network)
        layer.set_input(1, layer.get_input(2))

    with pytest.raises(ExportError, match=r"got reads keys from present\.3\.value/visible"):
        check(graph, spoil=values)
