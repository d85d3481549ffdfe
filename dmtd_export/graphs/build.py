"""The graphs of a bundle, three of them in both dialects. Nothing is traced: what stands here is what runs.

    full_pass    input_ids -> E -> T -> late rows -> D -> norm -> lm_head -> logits
    thinking     input_ids -> E -> T -> thought (late rows only)
    late_decode  input_ids, thought -> E -> D -> norm -> lm_head -> logits
    cycle        thinking, late_decode or both, and as often as num_steps says: arg-max -> E -> D -> ... -> logits.step1, ...

cycle is for ONNX Runtime on the CPU: in one session weights are there once, whatever runs, threads stay awake, and between a
cycle's steps there is no code of the host. Beside these graphs stand choose_token and sample_token, logits -> token_ids, for a
device that keeps its logits (``token_choice``).

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
| thinks; num_steps | [1] | bool; int64 | cycle: whether T runs, how often D; above 1, logit_rows are all rows, one a sequence |
| late_ids | [batch, late_len] | int64 | cycle; late_decode's input_ids, read where T does not run |
| new_thought | [batch, late_len, hidden] | model | out of cycle, thinking's thought |

E runs over window rows in full_pass and thinking, over late rows in late_decode.
"""

from __future__ import annotations

from dataclasses import replace

import onnx

from dmtd_export.graphs.layers import Keep, State, decoder_layer, sum_state
from dmtd_export.graphs.ort import OrtRows
from dmtd_export.graphs.rows import GraphSpec
from dmtd_export.graphs.standard import StandardRows
from dmtd_export.graphs.token_choice import write_choose_token, write_sample_token
from dmtd_export.graphs.writer import ONNX_DTYPES, GraphWriter, Made
from dmtd_models.config.model import DmtdSpec
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import Dialect, GraphName, Group
from dmtd_runtime.bundle.manifest import GraphInfo, TensorInfo
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
    if name == contract.CYCLE:
        assert dialect == contract.ONNXRUNTIME, "the cycle graph is in ONNX Runtime's dialect alone"
        write_cycle(OrtRows(writer, spec, slots))
    else:
        write_decoder(
            name, StandardRows(writer, spec) if dialect == contract.STANDARD else OrtRows(writer, spec, slots)
        )
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
    encoding, thinking, decoding = _layers(rows.spec.dmtd)
    late = name == contract.LATE_DECODE
    window_group: Group = "late" if late else "thinking"
    layers = [*encoding, *([] if late else thinking), *([] if name == contract.THINKING else decoding)]

    rows.declare_tokens("late_len" if late else "window_len")
    if late:
        thought = rows.declare_thought()
    else:
        rows.declare_late_rows()
    for layer in layers:
        rows.dialect.declare_cache(layer, "late" if layer in decoding else window_group)
    rows.add_window_group(window_group, layers[0])
    h = _encode(rows, rows.embed(), encoding, window_group)
    if late:
        late_hidden, late_thought = h, thought
    else:
        late_thought = _think(rows, h, thinking)
        if name == contract.THINKING:
            rows.write_thought(late_thought)
            return
        rows.add_late_group(decoding[0])
        late_hidden = rows.select_late(h, "/model/encode/late")
    entering = rows.gate(late_hidden, late_thought)
    rows.declare_logit_rows()
    rows.write_logits(_decode(rows, entering, decoding, rows.select_logits))


def _layers(dmtd: DmtdSpec) -> tuple[range, range, range]:
    """E's, T's and D's."""
    first_late = dmtd.encoding_layers + dmtd.thinking_layers
    encoding, thinking = range(dmtd.encoding_layers), range(dmtd.encoding_layers, first_late)
    return encoding, thinking, range(first_late, first_late + dmtd.decoding_layers)


def _encode(rows: StandardRows | OrtRows, embedded: str, encoding: range, group: Group) -> str:
    """E over rows [..., n, hidden]."""
    hidden = State(residual=embedded)
    for layer in encoding:
        hidden = decoder_layer(rows.dialect, hidden, layer, group)
    return sum_state(rows.writer, hidden, "/model/encode/output")


def _think(rows: StandardRows | OrtRows, entering: str, thinking: range) -> str:
    """T over window rows [..., n, hidden]: of the late ones among them."""
    state = State(residual=entering)
    for layer in thinking:
        keep = rows.select_late if layer == thinking[-1] else None
        state = decoder_layer(rows.dialect, state, layer, "thinking", keep)
    return sum_state(rows.writer, state, "/model/think/output")


def _decode(rows: StandardRows | OrtRows, entering: str, decoding: range, keep: Keep | None = None) -> str:
    """D, norm and lm_head over rows [..., n, hidden]: float32 [..., m, vocab] of those that are kept."""
    writer, state = rows.writer, State(residual=entering)
    for layer in decoding:
        state = decoder_layer(rows.dialect, state, layer, "late", keep if layer == decoding[-1] else None)
    last = sum_state(writer, state, "/model/decode/output")
    normed = rows.dialect.norm(last, f"{FINAL_NORM}.weight", "/model/norm")
    product = rows.lm_head(normed)
    if rows.spec.dtype != "float32":
        product = writer.op("Cast", [product], "/lm_head", attrs={"to": ONNX_DTYPES["float32"]})
    return product


def write_cycle(rows: OrtRows) -> None:
    """Write the cycle graph: T where it is asked for, D, and D again as often as is asked for."""
    writer, spec, dialect = rows.writer, rows.spec, rows.dialect
    encoding, thinking, decoding = _layers(spec.dmtd)
    rows.declare_tokens("window_len")
    late_ids = writer.input(contract.LATE_IDS, ["batch", "late_len"], "int64")
    rows.declare_late_rows()
    thought = rows.declare_thought()
    rows.declare_logit_rows()
    thinks, num_steps = writer.input(contract.THINKS, [1], "bool"), writer.input(contract.NUM_STEPS, [1], "int64")
    for layer in (*encoding, *thinking):
        dialect.declare_past(layer, "thinking")
    for layer in (*(encoding if rows.num_slots > 1 else ()), *decoding):  # E's of a single slot are declared
        dialect.declare_past(layer, "late")
    dialect.add_packed_group()
    dialect.add_batch_group(late_ids, several=rows.num_slots > 1)

    with dialect.branch("/thinking") as window:
        h = _encode(rows, rows.embed(), encoding, "thinking")
        late_thought, late_hidden = _think(rows, h, thinking), rows.select_late(h, "/model/encode/late")
    with dialect.branch("/waiting") as waiting:
        own = _encode(rows, rows.embed(late_ids), encoding, "late")
        given = writer.op("Identity", [thought], "/thought")
    late_dims: tuple[int | str, ...] = (*rows.leading, "late_row", spec.config.hidden_size)
    hidden = Made(
        info=TensorInfo(name="/late/hidden", dims=late_dims, dtype=spec.dtype),
        then=late_hidden,
        otherwise=own,
        leaves=False,
    )
    thoughts = replace(hidden, info=replace(hidden.info, name="/late/thought"), then=late_thought, otherwise=given)
    written = [info for layer in encoding for info in dialect.caches(layer, "late")]
    written += [info for layer in (*encoding, *thinking) for info in dialect.caches(layer, "thinking")]
    caches = {
        info.name: Made(info=info, then=window.caches.get(info.name), otherwise=waiting.caches.get(info.name))
        for info in written  # E's of a single slot are the same ones, whichever branch writes them
    }
    writer.conditional(thinks, "/think", window.nodes, waiting.nodes, [hidden, thoughts, *caches.values()])
    rows.write_thought(thoughts.info.name, contract.NEW_THOUGHT)

    for step in range(min(spec.dmtd.cycle_length, contract.MAX_STEPS)):
        path = f"/step{step}"
        wanted = writer.op("Greater", [num_steps, writer.constant([step], "int64")], f"{path}/wanted")
        with dialect.branch(path, step, encoding if step == 1 and rows.num_slots > 1 else ()) as late:
            if step:
                late_hidden = _encode(rows, rows.embed(rows.likeliest(contract.logits(step - 1))), encoding, "late")
                product = _decode(rows, late_hidden, decoding)  # a late step reads no thought, and one row a sequence
            else:
                entering = rows.gate(hidden.info.name, thoughts.info.name)
                product = _decode(rows, entering, decoding, rows.select_logits)
            outer = rows.outer(product, "/logits")
        dims = (1, "batch" if step else "num_logits", spec.config.vocab_size)
        made = [Made(info=TensorInfo(name=contract.logits(step), dims=dims, dtype="float32"), then=outer)]
        written = [info for layer in (*encoding, *decoding) for info in dialect.caches(layer, "late", step)]
        made += [Made(info=info, then=late.caches[info.name]) for info in written if info.name in late.caches]
        writer.conditional(wanted, path, late.nodes, [], made)
    _keep_weights(rows, num_steps)


def _keep_weights(rows: OrtRows, num_steps: str) -> None:
    """Let a branch that no run takes read all weights that products read in the others.

    ONNX Runtime lets go of a weight once its only readers have packed it, and plans no memory for a branch some outer value of
    which is gone: each of hundreds of tensors is then allocated anew in every run. Weights stay mapped and are never touched;
    scales that a session casts take their place in memory, a tenth of the codes'. Codes of products of whole numbers, which it
    makes itself, would take as much as packed ones, so their branches go without.
    """
    writer, path = rows.writer, "/kept"
    never = writer.op("Less", [num_steps, writer.constant([0], "int64")], path)
    for dtype, names in writer.read_in_branches(("MatMulNBits", "Gemm")).items():
        with writer.branch(f"{path}/{dtype}") as nodes:
            together = writer.op("SequenceConstruct", names, "/weights")
            first = writer.op("SequenceAt", [together, writer.constant(0, "int64")], "/first")
            outcome = writer.op("Shape", [first], "/shape")
        info = TensorInfo(name=f"{path}/{dtype}/outcome", dims=("rank",), dtype="int64")
        writer.conditional(never, f"{path}/{dtype}", nodes, [], [Made(info=info, then=outcome, leaves=False)])
