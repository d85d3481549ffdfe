"""The parsed network read back and held against the graph it was made from: a parse that succeeds proves nothing.

TensorRT's parser silently drops ``nonpad_kv_seqlen`` and windows, reads ``is_causal`` as upper-left, and drops inputs that
nothing reads. Rules, each a test:

1. The graph says nothing of attention that the parser would re-interpret: four inputs, no attributes but a ``scale`` of 1. With
   any other the parser multiplies queries and keys by its root, rounded to the model's type.
2. Inputs and outputs of the network are the graph's, by name, type and shape.
3. Every Attention is one attention layer with a boolean mask [batch, 1, rows, keys], no causal kind, no lengths, padded layout.
4. Every cache pair is one KV update from the network input ``past_key_values.*`` to the network output ``present.*``, of fixed
   capacity, in linear mode, with [batch] write indices.
5. Types are the graph's: products, attention and rotation in the model's type, sums of squares of the norms in float32.
6. Rotations are counted, over whole heads and not interleaved.
7. No table is a constant of the network.
8. Every DequantizeLinear is one dequantise layer with the graph's axis, from the constants of its codes and of its blocks'
   scales (or one scale, of 1), without zero points, into the model's type. Constants have the graph's bytes: codes stay codes.
9. Attention reads the graph's queries, and keys and values straight from the cache update or a slice of it: as they are, or
   times exactly 1, which is what the parser makes of that scale.

Layers come from the library as its base class; giving the object the class it has in C++ is how its Python API is meant to be
used. No library is imported here: ``Library.module`` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from dmtd_export.errors import ExportError
from dmtd_export.graphs.engine import EngineGraph, stored_weights
from dmtd_runtime.bundle.manifest import TensorInfo

TENSORRT_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
ATTENTION_INPUTS = 4  # query, key, value, mask


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """What reading back found, for the build record."""

    layers: int
    attentions: int
    cache_updates: int
    constant_bytes: int


def check_attention_nodes(model: onnx.ModelProto) -> None:
    """Rule 1. ExportError names the node and what is wrong with it."""
    for node in model.graph.node:
        if node.op_type != "Attention":
            continue
        given = {attribute.name: attribute for attribute in node.attribute}
        scale = given.pop("scale", None)
        if scale is None or scale.f != 1.0:
            got = "no scale" if scale is None else f"a scale of {scale.f:g}"
            _fail(node.name, f"{got}, which TensorRT would round to the model's type", "1")
        if given:
            _fail(node.name, f"has {', '.join(sorted(given))}", "an explicit mask and no such attribute")
        if len(node.input) < ATTENTION_INPUTS or not node.input[3]:
            _fail(node.name, "has no mask", "an explicit boolean mask")
        if extra := [name for name in node.input[ATTENTION_INPUTS:] if name]:
            _fail(node.name, f"reads {', '.join(extra)}", "query, key, value and mask only")
        if len([name for name in node.output if name]) != 1:
            _fail(node.name, f"has {len(node.output)} outputs", "one")


def check_network(module: Any, network: Any, graph: EngineGraph, dtype: str) -> NetworkFacts:
    """All rules, over a freshly parsed network. Raises ExportError with the first difference."""
    check_attention_nodes(graph.model)
    _check_values("input", graph.inputs, [network.get_input(i) for i in range(network.num_inputs)])
    _check_values("output", graph.outputs, [network.get_output(i) for i in range(network.num_outputs)])
    layers = list(_layers(network))
    if not graph.aliases:  # a graph that chooses tokens: no layers of the model
        return NetworkFacts(layers=len(layers), attentions=0, cache_updates=0, constant_bytes=0)
    attentions = _check_attentions(module, layers, graph, dtype)
    updates = _check_updates(module, layers, graph)
    _check_sources(module, layers, graph)
    _check_types(module, layers, graph, dtype)
    _check_rotations(module, layers, graph)
    _check_blocks(module, layers, graph, dtype)
    return NetworkFacts(
        layers=len(layers),
        attentions=attentions,
        cache_updates=updates,
        constant_bytes=_constant_bytes(module, layers, graph),
    )


def prepare_attention(module: Any, network: Any) -> None:
    """What is changed in a network that was checked.

    Attention without a fused kernel may be built from others; by default the build would fail. And it reads queries and keys
    without the parser's products by 1: the builder does not take all of them away (seen in the size of late_decode's engine).
    """
    layers = list(_layers(network))
    makers = _makers(layers)
    for layer in _of_type(module, layers, "ATTENTION_INPUT", "IAttentionInputLayer"):
        layer.attention.decomposable = True
        for i in range(3):
            layer.attention.set_input(i, _without_ones(module, makers, layer.attention.get_input(i)))


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


def _of_type(module: Any, layers: list[Any], kind: str, cast: str) -> list[Any]:
    found = [layer for layer in layers if layer.type == getattr(module.LayerType, kind)]
    for layer in found:
        layer.__class__ = getattr(module, cast)
    return found


def _nodes(graph: EngineGraph, op: str) -> list[onnx.NodeProto]:
    return [node for node in graph.model.graph.node if node.op_type == op]


def _check_values(what: str, expected: tuple[TensorInfo, ...], tensors: list[Any]) -> None:
    got = {tensor.name: tensor for tensor in tensors}
    wanted = {info.name: info for info in expected}
    if missing := sorted(wanted.keys() - got.keys()):
        _fail(f"{what} {missing[0]}", "was dropped by the parser", "every one of the graph's")
    if extra := sorted(got.keys() - wanted.keys()):
        _fail(f"{what} {extra[0]}", "was added by the parser", "those of the graph only")
    for name, info in wanted.items():
        tensor = got[name]
        if _dtype(tensor) != TENSORRT_DTYPES[info.dtype]:
            _fail(f"{what} {name}", f"is {_dtype(tensor)}", info.dtype)
        dims = tuple(-1 if isinstance(dim, str) else dim for dim in info.dims)
        shape = tuple(tensor.shape)
        fits = len(shape) == len(dims) and all(s in (d, -1) or d == -1 for s, d in zip(shape, dims, strict=True))
        if not fits or (what == "input" and shape != dims):
            _fail(f"{what} {name}", f"has the shape {shape}", str(dims))


def _check_attentions(module: Any, layers: list[Any], graph: EngineGraph, dtype: str) -> int:
    nodes = _nodes(graph, "Attention")
    found = _of_type(module, layers, "ATTENTION_INPUT", "IAttentionInputLayer")
    if len(found) != len(nodes):
        _fail("attention", f"{len(found)} layers", f"{len(nodes)}, one for each node of the graph")
    for layer in found:
        attention = layer.attention
        name, mask = attention.name, attention.mask
        if attention.causal or attention.causal_kind != module.CausalMaskKind.NONE:
            _fail(name, f"is causal ({attention.causal_kind})", "only the graph's mask")
        if mask is None:
            _fail(name, "has no mask", "the graph's")
        if _dtype(mask) != "BOOL" or len(mask.shape) != 4:
            _fail(name, f"has a mask of {_dtype(mask)} {tuple(mask.shape)}", "bool [batch, 1, rows, keys]")
        if attention.key_value_lengths is not None or attention.query_lengths is not None:
            _fail(name, "has lengths of its own", "only the graph's mask")
        padded = module.AttentionIOForm.PADDED_BHND
        if attention.query_form != padded or attention.key_value_form != padded:
            _fail(name, f"has the layout {attention.query_form}", "PADDED_BHND")
        if attention.norm_op != module.AttentionNormalizationOp.SOFTMAX:
            _fail(name, f"normalises by {attention.norm_op}", "softmax")
        for i in range(3):
            if _dtype(attention.get_input(i)) != TENSORRT_DTYPES[dtype]:
                _fail(name, f"reads {_dtype(attention.get_input(i))}", dtype)
    return len(found)


def _check_sources(module: Any, layers: list[Any], graph: EngineGraph) -> None:
    """Rule 9."""
    makers = _makers(layers)
    nodes = {node.name: node for node in _nodes(graph, "Attention")}
    for layer in _of_type(module, layers, "ATTENTION_INPUT", "IAttentionInputLayer"):
        attention = layer.attention
        if attention.name not in nodes:
            _fail(attention.name, "is no node of the graph", f"one of {', '.join(nodes)}")
        node = nodes[attention.name]
        for i, what in enumerate(("queries", "keys", "values")):
            tensor = _without_ones(module, makers, attention.get_input(i))
            if tensor.name != node.input[i]:
                _fail(
                    attention.name, f"reads {what} from {tensor.name}", f"{node.input[i]}, as it is or times exactly 1"
                )
            maker = makers.get(tensor.name)
            if maker is not None and maker.type == module.LayerType.SLICE:
                maker = makers.get(maker.get_input(0).name)
            if what != "queries" and (maker is None or maker.type != module.LayerType.KV_CACHE_UPDATE):
                _fail(attention.name, f"reads {what} of no KV update", "the updated cache or a slice of it")


def _makers(layers: list[Any]) -> dict[str, Any]:
    """The layer that makes each tensor, by the tensor's name."""
    return {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}


def _without_ones(module: Any, makers: Mapping[str, Any], tensor: Any) -> Any:
    """What ``tensor`` is a product of with constants of exactly 1."""
    while (maker := makers.get(tensor.name)) is not None and maker.type == module.LayerType.ELEMENTWISE:
        maker.__class__ = module.IElementWiseLayer
        is_one = [_is_one(module, makers, maker.get_input(i)) for i in range(2)]
        if maker.op != module.ElementWiseOperation.PROD or True not in is_one:
            break
        tensor = maker.get_input(1 - is_one.index(True))
    return tensor


def _is_one(module: Any, makers: Mapping[str, Any], tensor: Any) -> bool:
    maker = makers.get(tensor.name)
    while maker is not None and maker.type in (module.LayerType.CAST, module.LayerType.SHUFFLE):
        maker = makers.get(maker.get_input(0).name)
    if maker is None or maker.type != module.LayerType.CONSTANT:
        return False
    maker.__class__ = module.IConstantLayer
    values = np.asarray(maker.weights)
    return bool(np.issubdtype(values.dtype, np.floating) and (values == 1).all())


def _check_updates(module: Any, layers: list[Any], graph: EngineGraph) -> int:
    found = _of_type(module, layers, "KV_CACHE_UPDATE", "IKVCacheUpdateLayer")
    pairs = {}
    for layer in found:
        cache, indices, output = layer.get_input(0), layer.get_input(2), layer.get_output(0)
        if not cache.is_network_input or not output.is_network_output:
            _fail(layer.name, f"goes from {cache.name} to {output.name}", "from an input of the network to an output")
        if layer.cache_mode != module.KVCacheMode.LINEAR or layer.update_lengths is not None:
            _fail(layer.name, f"updates in the mode {layer.cache_mode}", "linear, without lengths")
        if len(indices.shape) != 1 or cache.shape[2] < 1:
            _fail(
                layer.name,
                f"has caches {tuple(cache.shape)}, indices {tuple(indices.shape)}",
                "a fixed capacity, [batch]",
            )
        pairs[output.name] = cache.name
    for output, cache in graph.aliases.items():
        if pairs.get(output) != cache:
            _fail(output, f"comes from {pairs.get(output, 'no KV update')}", f"a KV update of {cache}")
    if extra := sorted(pairs.keys() - graph.aliases.keys()):
        _fail(extra[0], "is a KV update that the graph does not have", "the graph's only")
    return len(found)


def _check_types(module: Any, layers: list[Any], graph: EngineGraph, dtype: str) -> None:
    products = _of_type(module, layers, "MATRIX_MULTIPLY", "IMatrixMultiplyLayer")
    if len(products) != len(_nodes(graph, "Gemm")):
        _fail("matrix products", f"{len(products)}", f"{len(_nodes(graph, 'Gemm'))}")
    kinds = {"MATRIX_MULTIPLY": dtype, "ROTARY_EMBEDDING": dtype, "KV_CACHE_UPDATE": dtype, "REDUCE": "float32"}
    wanted = {getattr(module.LayerType, kind): expected for kind, expected in kinds.items()}
    for layer in layers:
        expected = wanted.get(layer.type)
        if expected is not None and _dtype(layer.get_output(0)) != TENSORRT_DTYPES[expected]:
            _fail(layer.name, f"computes in {_dtype(layer.get_output(0))}", expected)


def _check_rotations(module: Any, layers: list[Any], graph: EngineGraph) -> None:
    nodes = _nodes(graph, "RotaryEmbedding")
    found = _of_type(module, layers, "ROTARY_EMBEDDING", "IRotaryEmbeddingLayer")
    if len(found) != len(nodes):
        _fail("rotary embedding", f"{len(found)} layers", f"{len(nodes)}, one for each node of the graph")
    for layer in found:
        if layer.interleaved or layer.rotary_embedding_dim != 0:
            dims = layer.rotary_embedding_dim
            _fail(
                layer.name,
                f"rotates {dims or 'all'} dimensions, interleaved {layer.interleaved}",
                "halves of whole heads",
            )


def _check_blocks(module: Any, layers: list[Any], graph: EngineGraph, dtype: str) -> None:
    """Rule 8."""
    makers, found = _makers(layers), _of_type(module, layers, "DEQUANTIZE", "IDequantizeLayer")
    nodes = {node.name: node for node in _nodes(graph, "DequantizeLinear")}
    casts = {node.output[0]: node.input[0] for node in _nodes(graph, "Cast")}
    stored = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    if sorted(layer.name for layer in found) != sorted(nodes):
        _fail("dequantised weights", f"{len(found)} layers", f"{len(nodes)}, one for each node of the graph")
    for layer in found:
        node = nodes[layer.name]
        given = {attribute.name: attribute.i for attribute in node.attribute}
        codes, scales = layer.get_input(0), layer.get_input(1)
        tensor, maker = stored[node.input[0]], makers[codes.name]
        rows, width = tensor.dims
        kind = {"FLOAT8E4M3FN": "FP8"}.get(name := onnx.TensorProto.DataType.Name(tensor.data_type), name)
        if maker.type != module.LayerType.CONSTANT or maker.name != tensor.name or _dtype(codes) != kind:
            _fail(layer.name, f"reads {_dtype(codes)} from {maker.name}", f"{kind} from the constant {tensor.name}")
        if (source := _constant_behind(module, makers, scales)) != casts.get(node.input[1], node.input[1]):
            _fail(layer.name, f"has the scales {source}", casts.get(node.input[1], node.input[1]))
        shapes = [tuple(codes.shape), tuple(scales.shape)]
        per_block = (width // given["block_size"],) if "block_size" in given else ()
        wanted = [(rows, width), (rows, *per_block) if given else ()]
        if shapes != wanted or (given and layer.axis != given["axis"]):
            got = f"codes {shapes[0]} and scales {shapes[1]} along axis {layer.axis}"
            _fail(layer.name, f"has {got}", f"{wanted[0]} and {wanted[1]} along axis {given.get('axis', 'none')}")
        if layer.num_inputs > 2 and layer.get_input(2) is not None:
            _fail(layer.name, "has zero points", "codes about zero")
        if _dtype(layer.get_output(0)) != TENSORRT_DTYPES[dtype]:
            _fail(layer.name, f"gives {_dtype(layer.get_output(0))}", dtype)


def _constant_behind(module: Any, makers: Mapping[str, Any], tensor: Any) -> str:
    """The layer that makes a tensor, casts aside."""
    maker = makers[tensor.name]
    while maker.type == module.LayerType.CAST:
        maker = makers[maker.get_input(0).name]
    return str(maker.name)


def _constant_bytes(module: Any, layers: list[Any], graph: EngineGraph) -> int:
    """Bytes of all constants; those of the weights file are as many as there."""
    tables, stored, total = set(graph.tables.values()), stored_weights(graph.model), 0
    for layer in _of_type(module, layers, "CONSTANT", "IConstantLayer"):
        if layer.name in tables:
            _fail(layer.name, "is a constant", "a table as an input")
        weights, tensor = layer.weights, layer.get_output(0)
        # The library's own count of bytes is wrong for 4 bits.
        count = int(weights.size) // 2 if _dtype(tensor) == "INT4" else int(weights.nbytes)
        if layer.name in stored and count != stored[layer.name]:
            _fail(layer.name, f"has {count} bytes", f"{stored[layer.name]}, as stored")
        total += count
    return total


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype.name)


def _fail(what: str, got: str, expected: str) -> None:
    raise ExportError(
        f"{what}: got {got}, expected {expected}; this network would compute something else and is not built"
    )
