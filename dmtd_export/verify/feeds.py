"""Inputs of one graph for one call, written from the contract alone; on purpose the runtime's layouts are not used.

Standard graphs take ``[batch, rows]`` padded on the right. In the onnxruntime dialect T's windows are packed, the rows of
all slots one behind another; a slot that takes no part but stands before one that does gets one idle row, the rest is the
graph's own padding. Its late rows are a batch, one row for each slot, or several rows of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmtd_export.verify.scenario import Call, Scenario
from dmtd_runtime import contract
from dmtd_runtime.manifest import GraphInfo

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """``inputs`` by name, caches aside; ``late_at[i]`` says where the i-th sequence's late rows stand."""

    inputs: dict[str, Array]
    late_at: tuple[tuple[int, ...], ...]


def slots_of(graph: GraphInfo, num_sequences: int) -> tuple[int, ...]:
    """Which slot each sequence takes in a packed graph: one slot is left idle between them where there is room."""
    step = 2 if graph.slots >= 2 * num_sequences - 1 else 1
    return tuple(i * step for i in range(num_sequences))


def parts_of(graph: GraphInfo, call: Call, slots: Mapping[int, int]) -> list[dict[int, int]]:
    """The runs that one call needs, each slots by sequence: where a full pass has late rows of several sequences, one row each.

    Args:
        graph: which graph is run.
        call: rows of every sequence.
        slots: slots by sequence.
    """
    packed = graph.dialect == contract.ONNXRUNTIME
    if packed and graph.name == contract.FULL_PASS and any(len(call.lates[s]) != 1 for s in slots):
        return [{s: slot} for s, slot in slots.items()]
    return [dict(slots)]


def make_feed(
    graph: GraphInfo,
    scenario: Scenario,
    call: Call,
    slots: Mapping[int, int],
    thought: Array | None,
    resident: Mapping[int, int],
) -> Feed:
    """The feed of ``graph`` for the sequences in ``slots``, of those ``resident`` in its caches.

    ``thought`` is needed by late_decode only.
    """
    if graph.dialect == contract.STANDARD:
        feed = _standard(graph, scenario, call, slots, thought)
    else:
        feed = _packed(graph, scenario, call, slots, thought, resident)
    wanted = {info.name: info.dtype for info in graph.inputs}
    return Feed(
        inputs={name: array.astype(wanted[name]) for name, array in feed.inputs.items() if name in wanted},
        late_at=feed.late_at,
    )


def _standard(
    graph: GraphInfo, scenario: Scenario, call: Call, slots: Mapping[int, int], thought: Array | None
) -> Feed:
    sequences = list(slots)
    lates = [call.lates[s] for s in sequences]
    windows = lates if graph.name == contract.LATE_DECODE else [call.windows[s] for s in sequences]
    batch, rows, late_len = len(sequences), max(map(len, windows)), max(map(len, lates))
    ids, late_rows = np.zeros((batch, rows), np.int64), np.zeros((batch, late_len), np.int64)
    gates = {name: np.zeros((batch, late_len), bool) for name in (contract.GATE_HIDDEN, contract.GATE_THOUGHT)}
    thoughts = np.zeros((batch, late_len, 0 if thought is None else thought.shape[-1]), np.float32)
    for b, (s, window, late) in enumerate(zip(sequences, windows, lates, strict=True)):
        ids[b, : len(window)] = scenario.ids[s, window]
        late_rows[b, : len(late)] = np.arange(len(late)) + len(window) - len(late)
        gates[contract.GATE_HIDDEN][b, : len(late)] = scenario.gate_hidden[s, late]
        gates[contract.GATE_THOUGHT][b, : len(late)] = scenario.gate_thought[s, late]
        if thought is not None:
            thoughts[b, : len(late)] = thought[s, late]
    starts = np.array([window.start for window in windows])
    inputs = {
        contract.INPUT_IDS: ids,
        contract.POSITION_IDS: starts[:, None] + np.arange(rows),
        contract.write_indices("thinking"): starts,
        contract.write_indices("late"): np.array([late.start for late in lates]),
        contract.LATE_ROWS: late_rows,
        contract.LOGIT_ROWS: np.arange(late_len)[None].repeat(batch, 0),
        contract.THOUGHT: thoughts,
        **gates,
    }
    return Feed(
        inputs=inputs, late_at=tuple(tuple(range(b * late_len, b * late_len + len(r))) for b, r in enumerate(lates))
    )


def _packed(
    graph: GraphInfo,
    scenario: Scenario,
    call: Call,
    slots: Mapping[int, int],
    thought: Array | None,
    resident: Mapping[int, int],
) -> Feed:
    late_only = graph.name == contract.LATE_DECODE
    sequence_in = {slot: s for s, slot in slots.items()}
    # With several slots an idle row stands for each slot in front; a run of one sequence sees only its own late cache.
    window_slots = range(max(sequence_in) + 1)
    late_slots = list(sequence_in) if len(slots) == 1 else list(window_slots)
    ids: list[int] = []
    late_rows: list[int] = []
    for slot in window_slots:
        if slot not in sequence_in:
            late_rows += [len(ids)] if slot in late_slots else []
            ids.append(0)
            continue
        s, late = sequence_in[slot], call.lates[sequence_in[slot]]
        window = late if late_only else call.windows[s]
        late_rows.extend(range(len(ids) + len(window) - len(late), len(ids) + len(window)))
        ids.extend(int(scenario.ids[s, i]) for i in window)
    late_at, row = [], 0
    hidden, gates, thoughts = [], [], []
    for slot in late_slots:
        late = call.lates[sequence_in[slot]] if slot in sequence_in else range(1)
        if slot in sequence_in:
            late_at.append(tuple(range(row, row + len(late))))
        row += len(late)
        for i in late:
            s = sequence_in.get(slot, 0)
            hidden.append(bool(scenario.gate_hidden[s, i]))
            gates.append(bool(scenario.gate_thought[s, i]))
            thoughts.append(np.zeros(0) if thought is None else thought[s, i])
    # One row for each of several sequences, else several rows of one; thinking takes any shape for its late rows.
    shape = (row, 1) if len(slots) > 1 and all(len(call.lates[s]) == 1 for s in slots) else (1, row)
    late_totals = np.array([call.lates[sequence_in[slot]].stop if slot in sequence_in else 1 for slot in late_slots])
    inputs = {
        contract.INPUT_IDS: np.array(ids).reshape(shape if late_only else (1, -1)),
        contract.LATE_ROWS: np.array(late_rows).reshape(shape),
        contract.LOGIT_ROWS: np.arange(row),
        contract.GATE_HIDDEN: np.array(hidden).reshape(shape),
        contract.GATE_THOUGHT: np.array(gates).reshape(shape),
        contract.THOUGHT: np.stack(thoughts).reshape(*shape, -1) if thought is not None else np.zeros((*shape, 0)),
        contract.seqlens_k("late"): late_totals - 1,
        contract.total_sequence_length("late"): np.array([late_totals.max()]),
        **_window_lengths(call, sequence_in, {slot: s for s, slot in resident.items()}, graph.slots),
    }
    return Feed(inputs=inputs, late_at=tuple(late_at))


def _window_lengths(
    call: Call, sequence_in: Mapping[int, int], resident: Mapping[int, int], slots: int
) -> dict[str, Array]:
    """Lengths of every slot. The idle row of a resident sequence is written behind all rows of this call."""
    windows = []
    for slot in range(slots):
        if slot in sequence_in:
            windows.append(call.windows[sequence_in[slot]])
        else:
            row = call.lates[resident[slot]].stop if slot in resident else 0
            windows.append(range(row, row + 1))
    totals = np.array([window.stop for window in windows])
    return {
        contract.total_sequence_length("thinking"): totals,
        contract.seqlens_k("thinking"): totals - 1,
        contract.SLOT_ROWS: np.array([len(window) for window in windows]),
        contract.PAD_ROWS: np.array([slots - max(sequence_in) - 1]),
    }
