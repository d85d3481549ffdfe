"""Running one graph file over a scenario on the CPU, caches fed and read back as plain arrays.

Weights stay in the page cache (no prepacked copies), so a graph of any size needs little memory of its own. Every
cache row that a call has no business reading holds arbitrary numbers, so a mask or a length that is off by one shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dmtd_export.verify.feeds import make_feed, parts_of, slots_of
from dmtd_export.verify.scenario import Outcome, Scenario
from dmtd_runtime import contract
from dmtd_runtime.backends.ort_session import import_onnxruntime
from dmtd_runtime.errors import BackendError
from dmtd_runtime.manifest import CycleInfo, GraphInfo, TensorInfo

Array = np.ndarray[Any, np.dtype[Any]]


class Session(Protocol):
    """What runs a graph: an ONNX Runtime session, or ONNX's own evaluator."""

    def run(self, output_names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]: ...


OpenSession = Callable[[Path], Session]


def open_onnxruntime(path: Path) -> Session:
    """A session of ONNX Runtime on the CPU that reads its weights from the mapped file."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session: Session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session


def open_evaluator(path: Path) -> Session:
    """ONNX's reference evaluator: plain numpy, every type, standard operators only, slow."""
    from onnx.reference import ReferenceEvaluator

    session: Session = ReferenceEvaluator(str(path))
    return session


def run_graph(
    path: Path,
    graph: GraphInfo,
    cycle: CycleInfo,
    scenario: Scenario,
    thought: Array | None,
    open_session: OpenSession = open_onnxruntime,
) -> Outcome:
    """Run all calls of a scenario through a graph file. ``thought`` [sequences, n, hidden] feeds late_decode.

    Raises BackendError with the first line of what refuses the graph or the run.
    """
    count = len(scenario.lengths)
    # A graph for one slot runs the sequences one after another.
    together = graph.dialect == contract.STANDARD or graph.slots > 1
    groups = [tuple(range(count))] if together else [(s,) for s in range(count)]
    collected = _Collected(graph, scenario)
    try:
        session = open_session(path)
        for sequences in groups:
            _run_sequences(session, graph, cycle, scenario, sequences, thought, collected)
    except BackendError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0][:300]
        raise BackendError(f"{graph.file}: cannot be run: {first}") from error
    return collected.outcome()


def cache_layers(graph: GraphInfo) -> list[int]:
    """The absolute layers that a graph keeps caches for, in the order of computation."""
    return sorted({int(info.name.split(".")[1]) for info in graph.outputs if info.name.startswith("present.")})


def _run_sequences(
    session: Session,
    graph: GraphInfo,
    cycle: CycleInfo,
    scenario: Scenario,
    sequences: Sequence[int],
    thought: Array | None,
    collected: _Collected,
) -> None:
    caches = _Caches(graph, cycle, scenario, sequences)
    names = [info.name for info in graph.outputs]
    for call in scenario.calls:
        caches.spoil(
            [(call.lates if graph.name == contract.LATE_DECODE else call.windows)[s].start for s in sequences],
            [call.lates[s].start for s in sequences],
        )
        resident = dict(zip(sequences, caches.slots, strict=True))
        for slots in parts_of(graph, call, resident):
            feed = make_feed(graph, scenario, call, slots, thought, resident)
            own = caches.seen_by(list(slots.values()))
            outputs = dict(zip(names, session.run(names, {**feed.inputs, **own}), strict=True))
            caches.take(outputs, list(slots.values()))
            for name in (contract.THOUGHT, contract.LOGITS):
                if name in outputs:
                    flat = outputs[name].reshape(-1, outputs[name].shape[-1])
                    for s, at in zip(slots, feed.late_at, strict=True):
                        collected.rows[name][s, call.lates[s]] = flat[list(at)]
    for s, (layer, kind), rows in caches.final():
        target = collected.caches.setdefault((layer, kind), np.zeros((len(scenario.lengths), *rows.shape), np.float32))
        target[s] = rows


class _Collected:
    """Rows by sequence and position."""

    def __init__(self, graph: GraphInfo, scenario: Scenario) -> None:
        self.caches: dict[tuple[int, str], Array] = {}
        self.rows: dict[str, Array] = {}
        for info in graph.outputs:
            if info.name in (contract.THOUGHT, contract.LOGITS):
                width = info.dims[-1]
                assert isinstance(width, int), f"{info.name} has a fixed last dimension"
                self.rows[info.name] = np.zeros((*scenario.ids.shape, width), np.float32)

    def outcome(self) -> Outcome:
        return Outcome(
            thought=self.rows.get(contract.THOUGHT), logits=self.rows.get(contract.LOGITS), caches=self.caches
        )


class _Caches:
    """KV arrays of one graph by input name; knows which sequence stands in which array and row."""

    def __init__(self, graph: GraphInfo, cycle: CycleInfo, scenario: Scenario, sequences: Sequence[int]) -> None:
        self._scenario = scenario
        self._sequences = sequences
        self._packed = graph.dialect == contract.ONNXRUNTIME
        self.slots = slots_of(graph, len(sequences)) if self._packed else tuple(range(len(sequences)))
        self._late_layers = set(cycle.decoding_range)
        self._rng = np.random.default_rng(1)
        batch = self.slots[-1] + 1
        inputs = [info for info in graph.inputs if info.name.startswith("past_key_values.")]
        self.arrays = {info.name: self._noise(self._shape(info, batch), info.dtype) for info in inputs}

    def spoil(self, window_starts: Sequence[int], late_starts: Sequence[int]) -> None:
        """Overwrite every row that the next call must write itself, or must not see."""
        for name, array in self.arrays.items():
            starts = late_starts if int(name.split(".")[1]) in self._late_layers else window_starts
            for index, start in enumerate(starts):
                rows = self._rows(name, array, index)
                if rows is not None:
                    rows[:, start:] = self._noise(rows[:, start:].shape, array.dtype.name)

    def seen_by(self, slots: Sequence[int]) -> dict[str, Array]:
        """The arrays of a run over some slots: one sequence sees only its own part of a batched cache."""
        return {name: array[self._batch_part(name, array, slots)] for name, array in self.arrays.items()}

    def take(self, outputs: dict[str, Array], slots: Sequence[int]) -> None:
        for name, array in self.arrays.items():
            array[self._batch_part(name, array, slots)] = outputs[name.replace("past_key_values.", "present.")]

    def _batch_part(self, name: str, array: Array, slots: Sequence[int]) -> slice:
        own_node = self._packed and len(name.split(".")) == 4
        alone = self._packed and not own_node and len(slots) == 1 and len(array) > 1
        return slice(slots[0], slots[0] + 1) if alone else slice(None)

    def final(self) -> list[tuple[int, tuple[int, str], Array]]:
        """(sequence, (layer, kind), rows [kv_heads, n, head_dim]) of everything committed."""
        n = self._scenario.ids.shape[1]
        found = []
        for name, array in self.arrays.items():
            _, layer, kind, *_ = name.split(".")
            for index, sequence in enumerate(self._sequences):
                rows = self._rows(name, array, index)
                if rows is not None:
                    found.append((sequence, (int(layer), kind), rows[:, :n]))
        return found

    def _rows(self, name: str, array: Array, index: int) -> Array | None:
        """[kv_heads, capacity, head_dim] of a sequence, a view; None if the array belongs to another slot."""
        slot = self.slots[index]
        parts = name.split(".")
        own_node = self._packed and len(parts) == 4
        if own_node and int(parts[3]) != slot:
            return None
        rows: Array = array[0 if own_node else slot]
        return rows

    def _shape(self, info: TensorInfo, batch: int) -> list[int]:
        symbols = {"batch": batch, "capacity": self._scenario.capacity}
        return [symbols[dim] if isinstance(dim, str) else dim for dim in info.dims]

    def _noise(self, shape: Sequence[int], dtype: str) -> Array:
        return self._rng.standard_normal(shape).astype(dtype)
