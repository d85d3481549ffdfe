"""The three graphs of a bundle, each in both dialects. Nothing is traced: what stands here is what runs.

    full_pass    input_ids -> E -> T -> late rows -> D -> norm -> lm_head -> logits
    thinking     input_ids -> E -> T -> thought (late rows only)
    late_decode  input_ids, thought -> E -> D -> norm -> lm_head -> logits

and beside them choose_token and sample_token, logits -> token_ids, for a device that keeps its logits (``token_choice``).

Inputs and outputs (standard dialect; the onnxruntime dialect differs in its rows, see ``contract``):

| name | dims | dtype | graphs |
|---|---|---|---|
| input_ids, position_ids | [batch, window_len], late_decode [batch, late_len] | int64 | all |
| thinking_write_indices, late_write_indices | [batch] | int64 | those that run the group |
| late_rows | [batch, late_len] | int64 | full_pass, thinking |
| gate_hidden, gate_thought | [batch, late_len] | bool | full_pass, late_decode |
| logit_rows | [batch, num_logits] | int64 | full_pass, late_decode |
| past_key_values.{layer}.key, .value | [batch, kv_heads, capacity, head_dim] | model | all, for the layers they run |
| thought | [batch, late_len, hidden] | model | out of thinking, into late_decode |
| logits | [batch, num_logits, vocab] | float32 | out of full_pass and late_decode |

E runs over window rows in full_pass and thinking, over late rows in late_decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from dmtd_export.graphs.layers import State, decoder_layer, linear, sum_state
from dmtd_export.graphs.ort import OrtDialect
from dmtd_export.graphs.standard import StandardDialect
from dmtd_export.graphs.token_choice import write_choose_token, write_sample_token
from dmtd_export.graphs.writer import ONNX_DTYPES, GraphWriter
from dmtd_models.config.model import DmtdSpec, ModelConfig
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import Dialect, GraphName, Group
from dmtd_runtime.bundle.manifest import GraphInfo, WeightInfo
from dmtd_runtime.sampling.sampler import MAX_CANDIDATES
from dmtd_runtime.version import __version__

EMBED, FINAL_NORM, LM_HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """What to build: model, split, stored dtype and the tensors of the weights file."""

    config: ModelConfig
    dmtd: DmtdSpec
    dtype: str
    weights: Mapping[str, WeightInfo]


def build_graph(
    spec: GraphSpec, name: GraphName, dialect: Dialect, slots: int = 1
) -> tuple[onnx.ModelProto, GraphInfo]:
    """Build one graph. Returns the protobuf (no weights inside) and its record for the manifest."""
    writer = GraphWriter(name, spec.weights)
    if name in contract.CHOICE_GRAPHS:
        if name == contract.CHOOSE_TOKEN:
            write_choose_token(writer, spec.config.vocab_size)
        else:
            write_sample_token(writer, spec.config.vocab_size, MAX_CANDIDATES)
        return writer.finish(__version__, name), _graph_info(writer, name, dialect, slots)
    shape: _StandardRows | _OrtRows
    shape = _StandardRows(writer, spec) if dialect == contract.STANDARD else _OrtRows(writer, spec, slots)
    _write(writer, spec, name, shape)
    model = writer.finish(__version__, f"{name}, {dialect} dialect")
    return model, _graph_info(writer, name, dialect, slots)


def _graph_info(writer: GraphWriter, name: GraphName, dialect: Dialect, slots: int) -> GraphInfo:
    return GraphInfo(
        name=name,
        dialect=dialect,
        file=contract.graph_file(name, dialect, slots),
        slots=slots,
        inputs=tuple(writer.inputs),
        outputs=tuple(writer.outputs),
        weights=writer.weights,
    )


def _write(writer: GraphWriter, spec: GraphSpec, name: GraphName, shape: _StandardRows | _OrtRows) -> None:
    dmtd = spec.dmtd
    first_late = dmtd.encoding_layers + dmtd.thinking_layers
    encoding, thinking = range(dmtd.encoding_layers), range(dmtd.encoding_layers, first_late)
    decoding = range(first_late, first_late + dmtd.decoding_layers)
    window_group: Group = "late" if name == contract.LATE_DECODE else "thinking"
    layers = {
        contract.FULL_PASS: [*encoding, *thinking, *decoding],
        contract.THINKING: [*encoding, *thinking],
        contract.LATE_DECODE: [*encoding, *decoding],
    }[name]

    shape.declare_tokens("late_len" if name == contract.LATE_DECODE else "window_len")
    if name != contract.LATE_DECODE:
        shape.declare_late_rows()
    if name == contract.LATE_DECODE:
        thought = shape.declare_thought()
    for layer in layers:
        shape.dialect.declare_cache(layer, "late" if layer in decoding else window_group)
    shape.add_window_group(window_group, layers[0])
    embedded = shape.embed()
    hidden = State(residual=embedded)
    for layer in encoding:
        hidden = decoder_layer(shape.dialect, hidden, layer, window_group)
    h = sum_state(writer, hidden, "/model/encode/output")
    if name == contract.LATE_DECODE:
        late_hidden, late_thought = h, thought
    else:
        state = State(residual=h)
        for layer in thinking:
            keep = shape.select_late if layer == thinking[-1] else None
            state = decoder_layer(shape.dialect, state, layer, window_group, keep)
        late_thought = sum_state(writer, state, "/model/think/output")
        if name == contract.THINKING:
            shape.write_thought(late_thought)
            return
        shape.add_late_group(decoding[0])
        late_hidden = shape.select_late(h, "/model/encode/late")
    state = State(residual=shape.gate(late_hidden, late_thought))
    shape.declare_logit_rows()
    for layer in decoding:
        keep = shape.select_logits if layer == decoding[-1] else None
        state = decoder_layer(shape.dialect, state, layer, "late", keep)
    rows = sum_state(writer, state, "/model/decode/output")
    normed = shape.dialect.norm(rows, f"{FINAL_NORM}.weight", "/model/norm")
    head = EMBED if spec.config.tie_word_embeddings else LM_HEAD
    product = linear(writer, normed, (head,), "/lm_head")
    if spec.dtype != "float32":
        product = writer.op("Cast", [product], "/lm_head", attrs={"to": ONNX_DTYPES["float32"]})
    shape.write_logits(product)


class _Rows:
    """What both layouts share: gates, and the way of activations between [rows, hidden] and their outer shape."""

    def __init__(self, writer: GraphWriter, spec: GraphSpec) -> None:
        self.writer = writer
        self.spec = spec

    def embed(self) -> str:
        w = self.writer
        embedded = w.op("Gather", [w.weight(f"{EMBED}.weight"), contract.INPUT_IDS], "/model/embed_tokens")
        return self.flat(embedded, "/model/embed_tokens")

    def flat(self, x: str, path: str) -> str:
        """[..., hidden] -> [rows, hidden]."""
        return self.writer.op(
            "Reshape", [x, self.writer.constant([-1, self.spec.config.hidden_size], "int64")], f"{path}/rows"
        )

    def gated(self, hidden: str, thought: str, dims: Sequence[int | str]) -> str:
        """u = select(gate_hidden, hidden) + select(gate_thought, thought); a select, because 0 * NaN is NaN."""
        w, zero = self.writer, self.writer.constant(0.0, self.spec.dtype)
        column = w.constant([-1, 1], "int64")
        parts = []
        for gate, x in ((contract.GATE_HIDDEN, hidden), (contract.GATE_THOUGHT, thought)):
            w.input(gate, dims, "bool")
            mask = w.op("Reshape", [gate, column], f"/model/{gate}/column")
            parts.append(w.op("Where", [mask, x, zero], f"/model/{gate}"))
        return w.op("Add", parts, "/model/decode/input")


class _StandardRows(_Rows):
    """Rectangular rows: [batch, rows] outside, [batch * rows, hidden] inside."""

    def __init__(self, writer: GraphWriter, spec: GraphSpec) -> None:
        super().__init__(writer, spec)
        self.dialect = StandardDialect(writer, spec.config, spec.dtype)

    def declare_tokens(self, rows: str) -> None:
        for name in (contract.INPUT_IDS, contract.POSITION_IDS):
            self.writer.input(name, ["batch", rows], "int64")

    def declare_late_rows(self) -> None:
        self.writer.input(contract.LATE_ROWS, ["batch", "late_len"], "int64")

    def declare_thought(self) -> str:
        thought = self.writer.input(
            contract.THOUGHT, ["batch", "late_len", self.spec.config.hidden_size], self.spec.dtype
        )
        return self.flat(thought, "/model/thought")

    def add_window_group(self, group: Group, layer: int) -> None:
        self.dialect.add_group(group, contract.POSITION_IDS, layer)

    def add_late_group(self, layer: int) -> None:
        positions = self.writer.op(
            "GatherElements", [contract.POSITION_IDS, contract.LATE_ROWS], "/late_rows/positions", attrs={"axis": 1}
        )
        self.dialect.add_group("late", positions, layer)

    def select_late(self, x: str, path: str) -> str:
        return self._select(x, contract.INPUT_IDS, contract.LATE_ROWS, path)

    def declare_logit_rows(self) -> None:
        self.writer.input(contract.LOGIT_ROWS, ["batch", "num_logits"], "int64")

    def select_logits(self, x: str, path: str) -> str:
        return self._select(x, contract.GATE_HIDDEN, contract.LOGIT_ROWS, path)

    def _select(self, x: str, like: str, rows: str, path: str) -> str:
        """Rows of x, which is [batch * n, width] for ``like`` [batch, n], by indices [batch, m] -> [batch * m, width]."""
        w = self.writer
        outer = w.op("Shape", [like], f"{path}/outer")
        width = w.op("Shape", [x], f"{path}/width", attrs={"start": 1})
        batch = w.op("Concat", [outer, width], f"{path}/batch_shape", attrs={"axis": 0})
        flat = w.op("Concat", [w.constant([-1], "int64"), width], f"{path}/flat_shape", attrs={"axis": 0})
        index = w.op("Unsqueeze", [rows, w.constant([-1], "int64")], f"{path}/index")
        taken = w.op("GatherND", [w.op("Reshape", [x, batch], f"{path}/batch"), index], path, attrs={"batch_dims": 1})
        return w.op("Reshape", [taken, flat], f"{path}/flat")

    def gate(self, hidden: str, thought: str) -> str:
        return self.gated(hidden, thought, ["batch", "late_len"])

    def write_thought(self, x: str) -> None:
        self._write_rows(
            x,
            contract.LATE_ROWS,
            contract.THOUGHT,
            ["batch", "late_len", self.spec.config.hidden_size],
            self.spec.dtype,
        )

    def write_logits(self, x: str) -> None:
        self._write_rows(
            x, contract.LOGIT_ROWS, contract.LOGITS, ["batch", "num_logits", self.spec.config.vocab_size], "float32"
        )

    def _write_rows(self, x: str, like: str, name: str, dims: Sequence[int | str], dtype: str) -> None:
        w, path = self.writer, f"/{name}"
        shape = w.op(
            "Concat",
            [w.op("Shape", [like], f"{path}/shape"), w.constant([int(dims[-1])], "int64")],
            f"{path}/shape",
            attrs={"axis": 0},
        )
        w.op("Reshape", [x, shape], path, output=w.output(name, dims, dtype))


class _OrtRows(_Rows):
    """The onnxruntime dialect: packed window rows [1, window_len], late rows [batch, late_len]; row indices are flat."""

    def __init__(self, writer: GraphWriter, spec: GraphSpec, slots: int) -> None:
        super().__init__(writer, spec)
        self.dialect = OrtDialect(writer, spec.config, spec.dtype, slots)

    def declare_tokens(self, rows: str) -> None:
        self.writer.input(contract.INPUT_IDS, ["batch" if rows == "late_len" else 1, rows], "int64")

    def declare_late_rows(self) -> None:
        self.writer.input(contract.LATE_ROWS, ["batch", "late_len"], "int64")

    def declare_thought(self) -> str:
        dims: list[int | str] = ["batch", "late_len", self.spec.config.hidden_size]
        return self.flat(self.writer.input(contract.THOUGHT, dims, self.spec.dtype), "/model/thought")

    def add_window_group(self, group: Group, layer: int) -> None:
        if group == "late":
            self.dialect.add_batch_group(contract.INPUT_IDS)
        else:
            self.dialect.add_packed_group()

    def add_late_group(self, layer: int) -> None:
        self.dialect.add_batch_group(contract.LATE_ROWS)

    def select_late(self, x: str, path: str) -> str:
        flat = self.writer.op("Reshape", [contract.LATE_ROWS, self.writer.constant([-1], "int64")], f"{path}/index")
        return self.writer.op("Gather", [x, flat], path)

    def declare_logit_rows(self) -> None:
        self.writer.input(contract.LOGIT_ROWS, ["num_logits"], "int64")

    def select_logits(self, x: str, path: str) -> str:
        return self.writer.op("Gather", [x, contract.LOGIT_ROWS], path)

    def gate(self, hidden: str, thought: str) -> str:
        return self.gated(hidden, thought, ["batch", "late_len"])

    def write_thought(self, x: str) -> None:
        w, width = self.writer, self.spec.config.hidden_size
        outer = w.op("Shape", [contract.LATE_ROWS], "/thought/outer")
        shape = w.op("Concat", [outer, w.constant([width], "int64")], "/thought/shape", attrs={"axis": 0})
        w.op(
            "Reshape",
            [x, shape],
            "/thought",
            output=w.output(contract.THOUGHT, ["batch", "late_len", width], self.spec.dtype),
        )

    def write_logits(self, x: str) -> None:
        w = self.writer
        dims: list[int | str] = [1, "num_logits", self.spec.config.vocab_size]
        w.op("Unsqueeze", [x, w.constant([0], "int64")], "/logits", output=w.output(contract.LOGITS, dims, "float32"))
