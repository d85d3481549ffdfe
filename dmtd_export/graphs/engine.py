"""Standard graph of a bundle -> engine graph: what a builder is given, and what the simulator executes.

Three changes, and nothing else (see ``dmtd_runtime.bundle.engine_record`` for what a runtime makes of them):

1. The embedding table becomes the input ``embedding_table``, and where lm_head is tied to it also ``lm_head_table``. Two
   inputs for one buffer, because one input that is both gathered from and multiplied by is copied in every run.
2. The caches get a fixed capacity: TensorRT updates a cache in place only where that length is static.
3. Attention sees the first ``visible_len`` rows of the caches, the length of the new input ``visible_rows`` (0, 1, 2, ...), which
   also takes the place of the mask's own count over the capacity.

The file keeps its references into the weights file. It does not look at what a parser makes of it: ``network_check`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from dmtd_export.errors import ExportError
from dmtd_export.graphs.rows import TABLE
from dmtd_export.graphs.writer import ONNX_DTYPES
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import GraphName
from dmtd_runtime.bundle.manifest import TensorInfo

_ZERO, _AXIS = "/visible_rows/zero", "/visible_rows/axis"
_DTYPE_NAMES = {number: name for name, number in ONNX_DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGraph:
    """A graph for a builder, with its I/O contract. ``model`` holds no weights but small constants."""

    name: GraphName
    model: onnx.ModelProto
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    tables: dict[str, str]  # input -> tensor of the weights file
    aliases: dict[str, str]  # present.* -> past_key_values.*


def engine_graph(name: GraphName, model: onnx.ModelProto, capacity: int) -> EngineGraph:
    """The engine graph of the standard graph ``model``, which is changed, for caches of ``capacity`` rows.

    Raises:
        ExportError: the graph is not what this version exports.
    """
    graph, file = model.graph, contract.graph_file(name, contract.STANDARD)
    tables = _tables_to_inputs(graph, file)
    _fix_capacity(graph, capacity)
    _limit_attention(graph, file)
    outputs = tuple(_tensor_info(value) for value in graph.output)
    caches = [cache for value in outputs if (cache := contract.cache_name(value.name))]
    return EngineGraph(
        name=name,
        model=model,
        inputs=tuple(_tensor_info(value) for value in graph.input),
        outputs=outputs,
        tables=tables,
        aliases={contract.present(c.layer, c.kind): contract.past(c.layer, c.kind) for c in caches},
    )


def choice_graph(name: GraphName, model: onnx.ModelProto) -> EngineGraph:
    """A graph that chooses tokens from logits, as it is: it has neither tables nor caches."""
    return EngineGraph(
        name=name,
        model=model,
        inputs=tuple(_tensor_info(value) for value in model.graph.input),
        outputs=tuple(_tensor_info(value) for value in model.graph.output),
        tables={},
        aliases={},
    )


def stored_weights(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the tensors that a graph reads from the weights file, by name."""
    sizes = {}
    for item in model.graph.initializer:
        if item.data_location == onnx.TensorProto.EXTERNAL:
            sizes[item.name] = next(int(entry.value) for entry in item.external_data if entry.key == "length")
    return sizes


def _tables_to_inputs(graph: onnx.GraphProto, file: str) -> dict[str, str]:
    table = next((item for item in graph.initializer if item.name == TABLE), None)
    if table is None:
        raise ExportError(f"{file} has no initializer {TABLE}; export the bundle again")
    names = {"Gather": contract.EMBEDDING_INPUT, "Gemm": contract.LM_HEAD_INPUT}
    tables: dict[str, str] = {}
    for node in graph.node:
        if TABLE not in node.input:
            continue
        if node.op_type not in names:
            raise ExportError(
                f"{file}: {node.name} reads {TABLE}, expected a Gather or a Gemm; export the bundle again"
            )
        name = names[node.op_type]
        _rename_inputs(node, {TABLE: name})
        tables[name] = TABLE
    graph.initializer.remove(table)
    graph.input.extend(
        helper.make_tensor_value_info(name, table.data_type, list(table.dims)) for name in sorted(tables)
    )
    return tables


def _fix_capacity(graph: onnx.GraphProto, capacity: int) -> None:
    for value in (*graph.input, *graph.output):
        if contract.cache_name(value.name):
            value.type.tensor_type.shape.dim[2].dim_value = capacity


def _limit_attention(graph: onnx.GraphProto, file: str) -> None:
    counts = [node for node in graph.node if node.name.endswith("/cache_index/Range")]
    if not counts:
        raise ExportError(f"{file} has no mask over its caches; export the bundle again")
    renamed = {node.output[0]: contract.VISIBLE_ROWS for node in counts}
    shape, nodes = "/visible_rows/Shape_output_0", []
    for node in graph.node:
        if node in counts:
            continue
        _rename_inputs(node, renamed)
        if node.op_type == "Attention":
            for i in (1, 2):
                cut = f"{node.input[i]}/visible"
                nodes.append(
                    helper.make_node("Slice", [node.input[i], _ZERO, shape, _AXIS], [cut], name=f"{cut}/Slice")
                )
                node.input[i] = cut
        nodes.append(node)
    length = helper.make_node("Shape", [contract.VISIBLE_ROWS], [shape], name="/visible_rows/Shape")
    kept = _needed([length, *nodes], {value.name for value in graph.output})
    del graph.node[:]
    graph.node.extend(kept)
    for name, number in ((_ZERO, 0), (_AXIS, 2)):
        graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [1], [number]))
    graph.input.append(helper.make_tensor_value_info(contract.VISIBLE_ROWS, onnx.TensorProto.INT64, ["visible_len"]))


def _rename_inputs(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)


def _needed(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes that outputs depend on, in order: what only counted the capacity is gone."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return TensorInfo(name=value.name, dims=dims, dtype=_DTYPE_NAMES[kind.elem_type])
