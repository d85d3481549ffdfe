"""Inputs of one graph for one call, written from the contract alone; on purpose the runtime's layouts are not used.

Standard graphs take ``[batch, rows]`` padded on the right. In the onnxruntime dialect T's rows are packed, the windows of all
slots one behind another, and one row more that the attention nodes of slots without a window take. Late rows are
``[batch, late_len]``, of which one is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmtd_export.verify.scenario import Call, Scenario
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """``inputs`` by name, caches aside; ``late_at[i]`` says where the i-th sequence's late rows stand."""

    inputs: dict[str, Array]
    late_at: tuple[tuple[int, ...], ...]


def slots_of(graph: GraphInfo, num_sequences: int) -> tuple[int, ...]:
    """Which slot each sequence takes in a packed graph: one slot is left idle between them where there is room."""
    if graph.slots == 1:
        return (0,) * num_sequences
    step = 2 if graph.slots >= 2 * num_sequences - 1 else 1
    return tuple(i * step for i in range(num_sequences))


def runs_of(graph: GraphInfo, call: Call) -> list[tuple[int, ...]]:
    """Which sequences of a call can run together: GroupQueryAttention takes several rows of one sequence or one of several."""
    everyone = tuple(range(len(call.lates)))
    attends_late = graph.name != contract.THINKING
    single_rows = all(len(late) == 1 for late in call.lates)
    packed = graph.dialect == contract.ONNXRUNTIME
    if packed and ((attends_late and not single_rows) or (graph.slots == 1 and graph.name != contract.LATE_DECODE)):
        return [(sequence,) for sequence in everyone]
    return [everyone]


def make_feed(
    graph: GraphInfo, scenario: Scenario, call: Call, sequences: Sequence[int], thought: Array | None
) -> Feed:
    """The feed of ``graph`` for some sequences of the scenario. ``thought`` is needed by late_decode only."""
    inputs, late_at = _late_inputs(scenario, call, sequences, thought)
    if graph.dialect == contract.STANDARD:
        inputs |= _standard_inputs(graph, scenario, call, sequences)
    else:
        inputs |= _packed_inputs(graph, scenario, call, sequences, late_at)
    wanted = {info.name: info.dtype for info in graph.inputs}
    return Feed(
        inputs={name: array.astype(wanted[name]) for name, array in inputs.items() if name in wanted}, late_at=late_at
    )


def _late_inputs(
    scenario: Scenario, call: Call, sequences: Sequence[int], thought: Array | None
) -> tuple[dict[str, Array], tuple[tuple[int, ...], ...]]:
    """What both dialects take as [batch, late_len], and where each sequence's rows stand when that is flat."""
    lates = [call.lates[s] for s in sequences]
    batch, width = len(lates), max(map(len, lates))
    gates = {name: np.zeros((batch, width), bool) for name in (contract.GATE_HIDDEN, contract.GATE_THOUGHT)}
    thoughts = np.zeros((batch, width, 0 if thought is None else thought.shape[-1]), np.float32)
    for b, (s, late) in enumerate(zip(sequences, lates, strict=True)):
        gates[contract.GATE_HIDDEN][b, : len(late)] = scenario.gate_hidden[s, late]
        gates[contract.GATE_THOUGHT][b, : len(late)] = scenario.gate_thought[s, late]
        if thought is not None:
            thoughts[b, : len(late)] = thought[s, late]
    late_at = tuple(tuple(range(b * width, b * width + len(late))) for b, late in enumerate(lates))
    return {contract.THOUGHT: thoughts, **gates}, late_at


def _ids(scenario: Scenario, sequences: Sequence[int], ranges: Sequence[range]) -> Array:
    ids = np.zeros((len(ranges), max(map(len, ranges))), np.int64)
    for row, s, span in zip(ids, sequences, ranges, strict=True):
        row[: len(span)] = scenario.ids[s, span]
    return ids


def _standard_inputs(graph: GraphInfo, scenario: Scenario, call: Call, sequences: Sequence[int]) -> dict[str, Array]:
    lates = [call.lates[s] for s in sequences]
    windows = lates if graph.name == contract.LATE_DECODE else [call.windows[s] for s in sequences]
    ids, width = _ids(scenario, sequences, windows), max(map(len, lates))
    starts = np.array([window.start for window in windows])
    late_rows = np.zeros((len(lates), width), np.int64)
    for row, window, late in zip(late_rows, windows, lates, strict=True):
        row[: len(late)] = range(len(window) - len(late), len(window))
    return {
        contract.INPUT_IDS: ids,
        contract.POSITION_IDS: starts[:, None] + np.arange(ids.shape[1]),
        contract.write_indices("thinking"): starts,
        contract.write_indices("late"): np.array([late.start for late in lates]),
        contract.LATE_ROWS: late_rows,
        contract.LOGIT_ROWS: np.arange(width)[None].repeat(len(lates), 0),
    }


def _packed_inputs(
    graph: GraphInfo, scenario: Scenario, call: Call, sequences: Sequence[int], late_at: Sequence[Sequence[int]]
) -> dict[str, Array]:
    lates = [call.lates[s] for s in sequences]
    width = max(map(len, lates))
    late_totals = np.array([late.start + width for late in lates])
    inputs = {
        contract.INPUT_IDS: _ids(scenario, sequences, lates),
        contract.LOGIT_ROWS: np.concatenate([np.array(at) for at in late_at]),
        contract.seqlens_k("late"): late_totals - 1,
        contract.total_sequence_length("late"): late_totals.max(keepdims=True),
    }
    if graph.name == contract.LATE_DECODE:
        return inputs
    slots = slots_of(graph, len(call.lates))
    window_in = {slots[s]: call.windows[s] for s in sequences}
    sequence_in = {slots[s]: s for s in sequences}
    idle_row = sum(map(len, window_in.values()))
    ids: list[int] = []
    late_rows = np.zeros((len(lates), width), np.int64)
    kept, at = np.zeros(idle_row + (len(window_in) < graph.slots), np.int64), 0
    for slot in range(graph.slots):
        if slot in window_in:
            s, window = sequence_in[slot], window_in[slot]
            rows = np.arange(len(ids), len(ids) + len(window))
            ids.extend(int(scenario.ids[s, i]) for i in window)
            count = len(call.lates[s])
            late_rows[list(sequences).index(s), :count] = rows[len(rows) - count :]
            total = window.stop
        else:
            rows, total = np.array([idle_row]), 1
        kept[rows] = np.arange(at, at + len(rows))
        at += len(rows)
        inputs[contract.slot_rows(slot)] = rows
        inputs[contract.total_sequence_length("thinking", slot if graph.slots > 1 else None)] = np.array([total])
    ids += [0] * (len(kept) - len(ids))
    return inputs | {
        contract.INPUT_IDS: np.array([ids]),
        contract.LATE_ROWS: late_rows,
        contract.KEPT_ROWS: kept,
        contract.seqlens_k("thinking"): np.array(
            [window_in[slot].stop - 1 if slot in window_in else 0 for slot in range(graph.slots)]
        ),
    }
