"""Every name that a graph, the manifest and a runtime share, spelled once. Pure strings, no imports of the product.

Three graphs exist in two dialects:

- ``standard``: ONNX opset 24 only; rectangular, ``[batch, window_len]``, padding on the right; one KV buffer a
  layer for the whole batch.
- ``onnxruntime``: GroupQueryAttention; **packed**, ``[1, window_len]`` holds the rows of all slots one after another without
  padding between them. GroupQueryAttention takes several rows over a past for one sequence only, so a graph made for
  ``slots`` > 1 has one attention node per slot and layer (``.{slot}`` ends its KV names) while every matrix product
  reads its weights once for all rows. Rows behind the last slot's are dropped by ``*_pad_rows`` (see ``PAD_ROWS``).
"""

from __future__ import annotations

from typing import Literal

GraphName = Literal["full_pass", "thinking", "late_decode"]
Dialect = Literal["standard", "onnxruntime"]
Group = Literal["thinking", "late"]
Kind = Literal["key", "value"]

FULL_PASS: GraphName = "full_pass"
THINKING: GraphName = "thinking"
LATE_DECODE: GraphName = "late_decode"
GRAPH_NAMES: tuple[GraphName, ...] = (FULL_PASS, THINKING, LATE_DECODE)

STANDARD: Dialect = "standard"
ONNXRUNTIME: Dialect = "onnxruntime"
DIALECTS: tuple[Dialect, ...] = (STANDARD, ONNXRUNTIME)

# Inputs of both dialects.
INPUT_IDS = "input_ids"
LATE_ROWS = "late_rows"
GATE_HIDDEN = "gate_hidden"
GATE_THOUGHT = "gate_thought"
LOGIT_ROWS = "logit_rows"
# Standard dialect.
POSITION_IDS = "position_ids"
# Outputs (``thought`` is also late_decode's input).
THOUGHT = "thought"
LOGITS = "logits"

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.onnx.data"
DATA_LOADER_FILE = "polygraphy_data.py"
SCHEMA_VERSION = 1


def write_indices(group: Group) -> str:
    """Standard dialect: int64 [batch], the first KV row written in the group's layers."""
    return f"{group}_write_indices"


def seqlens_k(group: Group) -> str:
    """ONNX Runtime dialect: int32 [slots], committed rows + new rows - 1 of each slot."""
    return f"{group}_seqlens_k"


def total_sequence_length(group: Group) -> str:
    """ONNX Runtime dialect: int32 [slots], committed rows + new rows of each slot."""
    return f"{group}_total_sequence_length"


def slot_rows(group: Group) -> str:
    """ONNX Runtime dialect, slots > 1: int64 [slots], how many rows each attention node takes; never 0."""
    return f"{group}_slot_rows"


def pad_rows(group: Group) -> str:
    """ONNX Runtime dialect, slots > 1: int64 [1], zero rows appended before attention and dropped behind it.

    GroupQueryAttention refuses an empty sequence, so a trailing slot that takes no part gets one such row.
    """
    return f"{group}_pad_rows"


def past(layer: int, kind: Kind, slot: int | None = None) -> str:
    """KV input of an absolute layer number; ``slot`` only in packed graphs made for several slots."""
    return f"past_key_values.{layer}.{kind}" + ("" if slot is None else f".{slot}")


def present(layer: int, kind: Kind, slot: int | None = None) -> str:
    """KV output; its buffer is the one bound to :func:`past`."""
    return f"present.{layer}.{kind}" + ("" if slot is None else f".{slot}")


def graph_file(graph: GraphName, dialect: Dialect, slots: int = 1) -> str:
    """File name of a graph in the bundle."""
    if dialect == STANDARD:
        return f"{graph}.onnx"
    return f"{graph}.ort.onnx" if slots == 1 else f"{graph}.ort.batch{slots}.onnx"
