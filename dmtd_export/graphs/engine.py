"""The engine dialect: what a builder is given, and what the simulator executes.

It is the standard dialect but for four things (see ``dmtd_runtime.bundle.engine_record`` for what a runtime makes of them):

1. The embedding table is the input ``embedding_table``, and where lm_head is tied to it also ``lm_head_table``. Two inputs for
   one buffer, because one input that is both gathered from and multiplied by is copied in every run. Both are floats; a
   quantised lm_head is a product over blocks, tied or not.
2. The caches have a fixed capacity: TensorRT updates a cache in place only where that length is static.
3. Attention sees the first ``visible_len`` rows of the caches, the length of the input ``visible_rows`` (0, 1, 2, ...), which
   is also what the mask compares with.
4. Codes of quantised weights are two's complements without zero points, and scales of 8 bits factors behind DequantizeLinear:
   TensorRT takes no others.

Weights are references into the bundle's weights file, or where codes are among them into its copy with such
(``engines.weights``). What a parser makes of a graph is looked at by ``network_check``.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from dmtd_export.graphs.build import write_decoder
from dmtd_export.graphs.rows import TABLE, GraphSpec
from dmtd_export.graphs.standard import RowGroup, StandardDialect, StandardRows
from dmtd_export.graphs.writer import GraphWriter
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import GraphName, Group, Kind
from dmtd_runtime.bundle.manifest import GraphInfo, TensorInfo
from dmtd_runtime.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGraph:
    """A graph for a builder, with its I/O contract. ``model`` holds no weights but small constants."""

    name: GraphName
    model: onnx.ModelProto
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    tables: dict[str, str]  # input -> tensor of the weights file
    aliases: dict[str, str]  # present.* -> past_key_values.*


def engine_graph(spec: GraphSpec, name: GraphName, capacity: int) -> EngineGraph:
    """Write a decoder graph for an engine, with caches of ``capacity`` rows."""
    writer = GraphWriter(name, spec.weights, spec.quantised)
    rows = EngineRows(writer, spec, capacity)
    write_decoder(name, rows)
    caches = [cache for info in writer.outputs if (cache := contract.cache_name(info.name))]
    return EngineGraph(
        name=name,
        model=writer.finish(__version__, f"{name}, for an engine"),
        inputs=tuple(writer.inputs),
        outputs=tuple(writer.outputs),
        tables=rows.tables,
        aliases={contract.present(c.layer, c.kind): contract.past(c.layer, c.kind) for c in caches},
    )


def choice_graph(info: GraphInfo, model: onnx.ModelProto) -> EngineGraph:
    """A graph that chooses tokens from logits, as it is: it has neither tables nor caches."""
    return EngineGraph(name=info.name, model=model, inputs=info.inputs, outputs=info.outputs, tables={}, aliases={})


def stored_weights(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the tensors that a graph reads from the weights file, by name."""
    sizes = {}
    for item in model.graph.initializer:
        if item.data_location == onnx.TensorProto.EXTERNAL:
            sizes[item.name] = next(int(entry.value) for entry in item.external_data if entry.key == "length")
    return sizes


class EngineDialect(StandardDialect):
    """The standard dialect over caches of a fixed length, of which attention reads the visible rows."""

    signed_codes = True

    def __init__(self, writer: GraphWriter, spec: GraphSpec, capacity: int) -> None:
        super().__init__(writer, spec.config, spec.dtype)
        self.capacity = capacity
        self._visible_len = ""

    def add_group(self, group: Group, positions: str, any_layer: int) -> None:
        if not self._groups:  # not earlier: an engine's first input is input_ids, which tells its largest batch
            visible_rows = self.writer.input(contract.VISIBLE_ROWS, ["visible_len"], "int64")
            self._visible_len = self.writer.op("Shape", [visible_rows], "/visible_rows")
        super().add_group(group, positions, any_layer)

    def _cache_index(self, any_layer: int, path: str) -> str:
        return contract.VISIBLE_ROWS

    def _updated_cache(self, layer: int, kind: Kind, update: str, rows: RowGroup, path: str) -> str:
        """What attention reads of the cache: its visible rows."""
        w, whole = self.writer, super()._updated_cache(layer, kind, update, rows, path)
        start, axis = w.constant([0], "int64"), w.constant([2], "int64")
        cut = f"{whole}/visible"
        return w.op("Slice", [whole, start, self._visible_len, axis], cut, output=cut)


class EngineRows(StandardRows):
    """Rows of the standard dialect, with the embedding table as an input or two."""

    def __init__(self, writer: GraphWriter, spec: GraphSpec, capacity: int) -> None:
        super().__init__(writer, spec, EngineDialect(writer, spec, capacity))
        self.tables: dict[str, str] = {}

    def embedding_table(self) -> str:
        return self._table(contract.EMBEDDING_INPUT)

    def lm_head(self, x: str) -> str:
        if not self.spec.config.tie_word_embeddings or self.writer.block_format(TABLE):
            return super().lm_head(x)
        return self.writer.op("Gemm", [x, self._table(contract.LM_HEAD_INPUT)], "/lm_head", attrs={"transB": 1})

    def _table(self, name: str) -> str:
        self.tables[name] = TABLE
        config = self.spec.config
        return self.writer.input(name, (config.vocab_size, config.hidden_size), self.spec.dtype)
