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

import onnx

from dmtd_export.graphs.layers import State, decoder_layer, sum_state
from dmtd_export.graphs.ort import OrtRows
from dmtd_export.graphs.rows import GraphSpec
from dmtd_export.graphs.standard import StandardRows
from dmtd_export.graphs.token_choice import write_choose_token, write_sample_token
from dmtd_export.graphs.writer import ONNX_DTYPES, GraphWriter
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import Dialect, GraphName, Group
from dmtd_runtime.bundle.manifest import GraphInfo
from dmtd_runtime.sampling.sampler import MAX_CANDIDATES
from dmtd_runtime.version import __version__

FINAL_NORM = "model.norm"


def build_graph(
    spec: GraphSpec, name: GraphName, dialect: Dialect, slots: int = 1
) -> tuple[onnx.ModelProto, GraphInfo]:
    """Build one graph. Returns the protobuf (no weights inside) and its record for the manifest."""
    writer = GraphWriter(name, spec.weights, spec.quantised)
    if name in contract.CHOICE_GRAPHS:
        if name == contract.CHOOSE_TOKEN:
            write_choose_token(writer, spec.config.vocab_size)
        else:
            write_sample_token(writer, spec.config.vocab_size, MAX_CANDIDATES)
        return writer.finish(__version__, name), _graph_info(writer, name, dialect, slots)
    standard_caches = spec.kv_dtype == spec.dtype
    assert standard_caches or dialect == contract.ONNXRUNTIME, "standard graphs have caches of the model's type"
    write_decoder(name, StandardRows(writer, spec) if dialect == contract.STANDARD else OrtRows(writer, spec, slots))
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


def write_decoder(name: GraphName, rows: StandardRows | OrtRows) -> None:
    """Write the graph of that name in the dialect of ``rows``."""
    writer, spec, dmtd = rows.writer, rows.spec, rows.spec.dmtd
    first_late = dmtd.encoding_layers + dmtd.thinking_layers
    encoding, thinking = range(dmtd.encoding_layers), range(dmtd.encoding_layers, first_late)
    decoding = range(first_late, first_late + dmtd.decoding_layers)
    window_group: Group = "late" if name == contract.LATE_DECODE else "thinking"
    layers = {
        contract.FULL_PASS: [*encoding, *thinking, *decoding],
        contract.THINKING: [*encoding, *thinking],
        contract.LATE_DECODE: [*encoding, *decoding],
    }[name]

    rows.declare_tokens("late_len" if name == contract.LATE_DECODE else "window_len")
    if name != contract.LATE_DECODE:
        rows.declare_late_rows()
    if name == contract.LATE_DECODE:
        thought = rows.declare_thought()
    for layer in layers:
        rows.dialect.declare_cache(layer, "late" if layer in decoding else window_group)
    rows.add_window_group(window_group, layers[0])
    embedded = rows.embed()
    hidden = State(residual=embedded)
    for layer in encoding:
        hidden = decoder_layer(rows.dialect, hidden, layer, window_group)
    h = sum_state(writer, hidden, "/model/encode/output")
    if name == contract.LATE_DECODE:
        late_hidden, late_thought = h, thought
    else:
        state = State(residual=h)
        for layer in thinking:
            keep = rows.select_late if layer == thinking[-1] else None
            state = decoder_layer(rows.dialect, state, layer, window_group, keep)
        late_thought = sum_state(writer, state, "/model/think/output")
        if name == contract.THINKING:
            rows.write_thought(late_thought)
            return
        rows.add_late_group(decoding[0])
        late_hidden = rows.select_late(h, "/model/encode/late")
    state = State(residual=rows.gate(late_hidden, late_thought))
    rows.declare_logit_rows()
    for layer in decoding:
        keep = rows.select_logits if layer == decoding[-1] else None
        state = decoder_layer(rows.dialect, state, layer, "late", keep)
    last = sum_state(writer, state, "/model/decode/output")
    normed = rows.dialect.norm(last, f"{FINAL_NORM}.weight", "/model/norm")
    product = rows.lm_head(normed)
    if spec.dtype != "float32":
        product = writer.op("Cast", [product], "/lm_head", attrs={"to": ONNX_DTYPES["float32"]})
    rows.write_logits(product)
