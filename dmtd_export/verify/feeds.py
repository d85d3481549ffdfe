"""Inputs of one graph for one call, written from the contract alone; on purpose the runtime's layouts are not used.

Standard graphs take ``[batch, rows]`` padded on the right. Packed graphs take the rows of all slots one behind
another; a slot that takes no part but stands before one that does gets one idle row, the rest is the graph's own
padding (``pad_rows``).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def make_feed(
    graph: GraphInfo, scenario: Scenario, call: Call, sequences: Sequence[int], thought: Array | None
) -> Feed:
    """The feed of ``graph`` for some sequences of the scenario. ``thought`` is needed by late_decode only."""
    build = _standard if graph.dialect == contract.STANDARD else _packed
    feed = build(graph, scenario, call, sequences, thought)
    wanted = {info.name: info.dtype for info in graph.inputs}
    return Feed(
        inputs={name: array.astype(wanted[name]) for name, array in feed.inputs.items() if name in wanted},
        late_at=feed.late_at,
    )


def _standard(
    graph: GraphInfo, scenario: Scenario, call: Call, sequences: Sequence[int], thought: Array | None
) -> Feed:
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


def _packed(graph: GraphInfo, scenario: Scenario, call: Call, sequences: Sequence[int], thought: Array | None) -> Feed:
    slots = slots_of(graph, len(sequences))
    late_ranges = dict(zip(slots, [call.lates[s] for s in sequences], strict=True))
    window_ranges = dict(zip(slots, [call.windows[s] for s in sequences], strict=True))
    if graph.name == contract.LATE_DECODE:
        window_ranges = late_ranges
    sequence_in = dict(zip(slots, sequences, strict=True))
    ids: list[int] = []
    late_rows: list[int] = []
    gates: list[tuple[bool, bool]] = []
    thoughts: list[Array] = []
    late_at: list[tuple[int, ...]] = []
    for slot in range(slots[-1] + 1):
        if slot not in sequence_in:  # an idle row
            late_rows.append(len(ids))
            ids.append(0)
            gates.append((True, False))
            thoughts.append(np.zeros(0 if thought is None else thought.shape[-1], np.float32))
            continue
        s, window, late = sequence_in[slot], window_ranges[slot], late_ranges[slot]
        late_at.append(tuple(range(len(late_rows), len(late_rows) + len(late))))
        late_rows.extend(range(len(ids) + len(window) - len(late), len(ids) + len(window)))
        ids.extend(int(scenario.ids[s, i]) for i in window)
        gates.extend((bool(scenario.gate_hidden[s, i]), bool(scenario.gate_thought[s, i])) for i in late)
        thoughts.extend(np.zeros(0) if thought is None else thought[s, i] for i in late)
    inputs = {
        contract.INPUT_IDS: np.array([ids]),
        contract.LATE_ROWS: np.array(late_rows),
        contract.LOGIT_ROWS: np.arange(len(late_rows)),
        contract.GATE_HIDDEN: np.array([[hidden for hidden, _ in gates]]),
        contract.GATE_THOUGHT: np.array([[thought_gate for _, thought_gate in gates]]),
        contract.THOUGHT: np.stack(thoughts)[None],
        **_lengths("thinking", window_ranges, graph.slots),
        **_lengths("late", late_ranges, graph.slots),
    }
    return Feed(inputs=inputs, late_at=tuple(late_at))


def _lengths(group: contract.Group, ranges: dict[int, range], slots: int) -> dict[str, Array]:
    totals = np.array([ranges[slot].stop if slot in ranges else 1 for slot in range(slots)])
    return {
        contract.total_sequence_length(group): totals,
        contract.seqlens_k(group): totals - 1,
        contract.slot_rows(group): np.array([len(ranges[slot]) if slot in ranges else 1 for slot in range(slots)]),
        contract.pad_rows(group): np.array([slots - max(ranges) - 1]),
    }
