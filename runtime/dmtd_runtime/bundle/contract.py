"""Every name that a graph, the manifest and a runtime share, spelled once. Pure strings, no imports of the product.

Three graphs hold layers, and exist in two dialects (choose_token and sample_token hold none; cycle, which is all three and
the late steps behind them in one session, exists in ONNX Runtime's alone):

- ``standard``: ONNX opset 24 only; rectangular, ``[batch, window_len]``, padding on the right; one KV buffer a
  layer for the whole batch.
- ``onnxruntime``: GroupQueryAttention, which takes one row of several sequences or several rows of one. Late rows are
  ``[batch, late_len]`` with one of the two equal to 1. T's rows are **packed**, ``[1, window_len]``: the windows of all
  slots one behind another. A thinking or full_pass graph made for ``slots`` > 1 has one attention node per slot and layer
  (``.{slot}`` ends the KV names of its packed layers) while every matrix product reads its weights once for all rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

GraphName = Literal["full_pass", "thinking", "late_decode", "cycle", "choose_token", "sample_token"]
Dialect = Literal["standard", "onnxruntime"]
Group = Literal["thinking", "late"]
Kind = Literal["key", "value"]

FULL_PASS: GraphName = "full_pass"
THINKING: GraphName = "thinking"
LATE_DECODE: GraphName = "late_decode"
CYCLE: GraphName = "cycle"  # any of the three, and behind it the late steps that are left of a cycle
CHOOSE_TOKEN: GraphName = "choose_token"  # arg-max of logits, for backends whose logits stay on a device
SAMPLE_TOKEN: GraphName = "sample_token"  # the sampler's rules, for the same backends
CHOICE_GRAPHS: tuple[GraphName, ...] = (CHOOSE_TOKEN, SAMPLE_TOKEN)
DECODER_GRAPHS: tuple[GraphName, ...] = (FULL_PASS, THINKING, LATE_DECODE)

STANDARD: Dialect = "standard"
ONNXRUNTIME: Dialect = "onnxruntime"
DIALECTS: tuple[Dialect, ...] = (STANDARD, ONNXRUNTIME)
KINDS: tuple[Kind, ...] = ("key", "value")

# Inputs of both dialects.
INPUT_IDS = "input_ids"
LATE_ROWS = "late_rows"
GATE_HIDDEN = "gate_hidden"
GATE_THOUGHT = "gate_thought"
LOGIT_ROWS = "logit_rows"
# The cycle graph. ``thinks``, bool [1]: whether T runs; ``num_steps``, int64 [1]: how often D does. What does not run gives
# empty tensors. ``late_ids`` are read where T does not run, late_decode's input_ids.
THINKS = "thinks"
NUM_STEPS = "num_steps"
LATE_IDS = "late_ids"
# Standard dialect.
POSITION_IDS = "position_ids"
# Engine graphs: the standard dialect as TensorRT builds it (dmtd_export.graphs.engine). The embedding table, and the
# lm_head's where it is tied, are inputs bound to one device buffer. They are two inputs because a table that is both gathered
# from and multiplied by is copied in every run (measured: TensorRT-RTX 1.7 then plans its bytes as scratch memory; for two
# inputs it does not). ``visible_rows`` is int64 [visible_len] = 0, 1, 2, ...: attention sees so many cache rows and no more.
EMBEDDING_INPUT = "embedding_table"
LM_HEAD_INPUT = "lm_head_table"
VISIBLE_ROWS = "visible_rows"
# ONNX Runtime dialect, graphs made for several slots: int64 [window_len], where each packed row's attention stands among
# the rows of all attention nodes, slot 0's first (see slot_rows).
KEPT_ROWS = "thinking_kept_rows"
# Outputs (``thought`` is also late_decode's input).
THOUGHT = "thought"
NEW_THOUGHT = "new_thought"  # of the cycle graph, thinking's thought
LOGITS = "logits"
TOKEN_IDS = "token_ids"
IS_FINITE = "is_finite"
CONFIDENCE = "confidence"
# sample_token (dmtd_export.graphs.token_choice has the table).
TEMPERATURE = "temperature"
TOP_K = "top_k"
TOP_P = "top_p"
MIN_P = "min_p"
UNIFORMS = "uniforms"
REPETITION_PENALTY = "repetition_penalty"
FREQUENCY_PENALTY = "frequency_penalty"
PRESENCE_PENALTY = "presence_penalty"
LOGIT_BIAS = "logit_bias"
MASK_ENDS = "mask_ends"
END_IDS = "end_ids"
PROMPT_SEEN = "prompt_seen"
OUTPUT_COUNTS = "output_counts"
NEXT_OUTPUT_COUNTS = "next_output_counts"
HAS_CHOICE = "has_choice"

MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.onnx.data"
DATA_LOADER_FILE = "polygraphy_data.py"
ENGINES_DIRECTORY = "engines"
ENGINE_RECORD_FILE = "engine.json"
TOOL_USE_TEMPLATE_FILE = "chat_template_tool_use.jinja"
# Files of the checkpoint that a runtime reads: they count only where the manifest lists them.
ASSET_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    TOOL_USE_TEMPLATE_FILE,
    "generation_config.json",
    CONFIG_FILE,
)
DEVICE_MODEL_LEN = (
    4096  # tokens of a sequence on a device, whose caches are allocated at once, unless more are asked for
)
MIN_WINDOW = (
    256  # a runtime may pad a prompt's chunk up to this: KV capacity and rotary tables leave at least so much room
)
MAX_STEPS = 8  # of the cycle graph; of a longer cycle it runs as many at a time
ROTARY_TABLES = ("rotary.cos", "rotary.sin")
OLDEST_SCHEMA, SCHEMA_VERSION = 2, 3  # that are read; 3 has cycle graphs, int8 caches, fp8 and int8-channel
# A weight quantised in blocks stands in the weights file as two or three tensors in the place of one: codes uint8
# [out, blocks, bytes of a block], scales and, where the format has them, minimums [out, blocks].
CODES = "codes"
SCALES = "scales"
MINIMUMS = "minimums"
FACTORS = "factors"
# Caches in int8: a code k of a channel stands for k times the channel's scale; values are rounded to the nearest, ties to even,
# and saturate at -128 and 127.
INT8_RANGE = (-128, 127)


def write_indices(group: Group) -> str:
    """Standard dialect: int64 [batch], the first KV row written in the group's layers."""
    return f"{group}_write_indices"


def seqlens_k(group: Group) -> str:
    """ONNX Runtime dialect: int32 [slots] (late: [batch]), committed rows + new rows - 1 of each sequence."""
    return f"{group}_seqlens_k"


def total_sequence_length(group: Group, slot: int | None = None) -> str:
    """ONNX Runtime dialect: int32 [1], committed rows + new rows of the slot; late: of the longest sequence.

    An input of its own for each attention node, straight into it: GroupQueryAttention reads it on the host, and what a node
    makes of a host's value on a GPU lies on the device. ``slot`` only in packed graphs made for several slots.
    """
    return f"{group}_total_sequence_length" + ("" if slot is None else f".{slot}")


def slot_rows(slot: int) -> str:
    """ONNX Runtime dialect, graphs made for several slots: int64 [slot_len.{slot}], the packed rows of the slot's window.

    Never empty, because GroupQueryAttention refuses an empty sequence.
    """
    return f"thinking_slot_rows.{slot}"


def slot_len(slot: int) -> str:
    """The symbolic dimension of :func:`slot_rows`."""
    return f"slot_len.{slot}"


def block_part(name: str, kind: str) -> str:
    """The name of a part of a quantised weight: ``layer.q_proj.weight`` has the codes ``layer.q_proj.codes``."""
    return f"{name.rpartition('.')[0]}.{kind}"


def kv_scale(layer: int, kind: Kind) -> str:
    """The scales of a layer's keys or values where caches are int8: float32 [kv_heads * head_dim], one a channel."""
    return f"model.layers.{layer}.self_attn.{kind}_cache.scale"


def stack_name(names: Sequence[str]) -> str:
    """The initializer over weights that stand one behind another: the first one's name, then the others' modules."""
    return "+".join((names[0], *(name.split(".")[-2] for name in names[1:])))


def stack_parts(name: str) -> list[str]:
    """The weights behind an initializer, by their names in the weights file: the reverse of :func:`stack_name`."""
    first, *others = name.split("+")
    if not others:
        return [first]
    parent, _, kind = first.rsplit(".", 2)
    return [first, *(f"{parent}.{module}.{kind}" for module in others)]


def past(layer: int, kind: Kind, slot: int | None = None) -> str:
    """KV input of an absolute layer number; ``slot`` only in packed graphs made for several slots."""
    return f"past_key_values.{layer}.{kind}" + ("" if slot is None else f".{slot}")


def present(layer: int, kind: Kind, slot: int | None = None, *, step: int = 0) -> str:
    """KV output; its buffer is the one bound to :func:`past`, for all ``step``s of the cycle graph."""
    return f"present.{layer}.{kind}" + ("" if slot is None else f".{slot}") + (f".step{step}" if step else "")


def past_of(present: str) -> str:
    """The KV input that a KV output of the first step goes with."""
    return "past_key_values" + present.removeprefix("present")


def logits(step: int = 0) -> str:
    """Logits of a step of the cycle graph, of every row [1, batch, vocab] behind the first one."""
    return f"{LOGITS}.step{step}" if step else LOGITS


def step_of(output: str) -> int:
    """The step of the cycle graph that gives an output: the reverse of :func:`present` and :func:`logits`."""
    found = _STEP.search(output)
    return int(found[1]) if found else 0


class CacheName(NamedTuple):
    """What a KV input or output is named after."""

    layer: int
    kind: Kind
    slot: int | None


def cache_name(name: str) -> CacheName | None:
    """The parts of a name made by :func:`past` or :func:`present`; None for any other name."""
    found = _CACHE_NAME.fullmatch(name)
    if found is None:
        return None
    kind: Kind = "key" if found[2] == "key" else "value"
    return CacheName(int(found[1]), kind, None if found[3] is None else int(found[3]))


_CACHE_NAME = re.compile(r"(?:past_key_values|present)\.(\d+)\.(key|value)(?:\.(\d+))?(?:\.step\d+)?")
_STEP = re.compile(r"\.step(\d+)$")


def graph_file(graph: GraphName, dialect: Dialect, slots: int = 1) -> str:
    """File name of a graph in the bundle."""
    if dialect == STANDARD:
        return f"{graph}.onnx"
    return f"{graph}.ort.onnx" if slots == 1 else f"{graph}.ort.batch{slots}.onnx"
