"""Running one graph file over a scenario on the CPU, caches fed and read back as plain arrays.

Weights stay in the page cache (no prepacked copies), so a graph of any size needs little memory of its own. Every
cache row that a call has no business reading holds arbitrary numbers, so a mask or a length that is off by one shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import onnx

from dmtd_export.verify.feeds import make_feed, runs_of, slots_of
from dmtd_export.verify.int8_caches import Scales
from dmtd_export.verify.scenario import Call, Outcome, Scenario
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import CycleInfo, GraphInfo, TensorInfo
from dmtd_runtime.errors import BackendError
from dmtd_runtime.ort.library import import_onnxruntime
from dmtd_runtime.ort.links import graph_source, path_problem
from dmtd_runtime.ort.session import first_line

Array = np.ndarray[Any, np.dtype[Any]]
NOISE_STARTS = 1 << 16
INT8_NOISE = 30  # codes at one standard deviation of what no run may see
LIMITS = -127, 127


class Session(Protocol):
    """What runs a graph: an ONNX Runtime session, or ONNX's own evaluator."""

    def run(self, output_names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]: ...


OpenSession = Callable[[Path], Session]


def open_onnxruntime(path: Path, *, prepack: bool = False, optimise: bool = True) -> Session:
    """A session of ONNX Runtime on the CPU that reads its weights from the mapped file.

    ``prepack``: weights are copied into the kernels' own layout, without which products over blocks take another, slow way.
    ``optimise``: ONNX Runtime may put other nodes in the place of the graph's.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values: dict[str, Any] = {}
    tensors = _external(onnx.load(path, load_external_data=False))
    # ONNX Runtime takes no values of 4 bits, nor floats of 8, from numpy: such weights it must reach by itself.
    beyond_numpy = (onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT8E4M3FN)
    if path_problem(path) and all(tensor.data_type not in beyond_numpy for tensor in tensors):
        for tensor in tensors:
            values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(mapped(tensor, path.parent))
    with graph_source(path, options, values, holds_no_weights=not tensors) as source:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return _Holding(session, values)


class _Holding:
    """A session, and arrays that must live as long."""

    def __init__(self, session: Session, held: object) -> None:
        self._session, self._held = session, held

    def run(self, output_names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        return self._session.run(output_names, feed)


def open_evaluator(path: Path) -> Session:
    """ONNX's reference evaluator: plain numpy, every type, standard operators only, slow."""
    from onnx.reference import ReferenceEvaluator

    # onnx itself reads no weights that are reached by a link, nor from a file that has a second name.
    model = onnx.load(path, load_external_data=False)
    for tensor in _external(model):
        tensor.raw_data = _stored(tensor, path.parent).tobytes()
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    session: Session = ReferenceEvaluator(model)
    return session


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The initializers that stand in another file."""
    return [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]


def mapped(tensor: onnx.TensorProto, folder: Path) -> Array:
    """An initializer that stands in another file; not of 4 bits, which numpy has not."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array: Array = _stored(tensor, folder).view(dtype).reshape(tensor.dims)
    return array


def _stored(tensor: onnx.TensorProto, folder: Path) -> Array:
    """The bytes of an initializer that stands in another file, mapped."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    shape = (int(place["length"]),)
    return np.memmap(folder / place["location"], np.uint8, "r", offset=int(place.get("offset", 0)), shape=shape)


def run_graph(
    path: Path,
    graph: GraphInfo,
    cycle: CycleInfo,
    scenario: Scenario,
    thought: Array | None,
    open_session: OpenSession = open_onnxruntime,
    scales: Scales = MappingProxyType({}),
) -> Outcome:
    """Run all calls of a scenario through a graph file. ``thought`` [sequences, n, hidden] feeds late_decode.

    ``scales``: of int8 caches.

    Raises BackendError with the first line of what refuses the graph or the run.
    """
    collected = _Collected(graph, scenario)
    caches = _Caches(graph, cycle, scenario)
    try:
        session = open_session(path)
        for call in scenario.calls:
            for sequences in runs_of(graph, call):
                _run_call(session, graph, scenario, call, sequences, thought, caches, collected)
    except Exception as error:
        raise BackendError(f"{graph.file}: cannot be run: {first_line(error)}") from error
    final = caches.final()
    if not scales:
        return replace(collected.outcome(), caches={key: rows.astype(np.float32) for key, rows in final.items()})
    values = {key: codes * scales[key] for key, codes in final.items()}
    return replace(collected.outcome(), caches=values, codes=final)


def cache_layers(graph: GraphInfo) -> list[int]:
    """The absolute layers that a graph keeps caches for, in the order of computation."""
    names = [contract.cache_name(info.name) for info in graph.outputs]
    return sorted({name.layer for name in names if name})


def _run_call(
    session: Session,
    graph: GraphInfo,
    scenario: Scenario,
    call: Call,
    sequences: Sequence[int],
    thought: Array | None,
    caches: _Caches,
    collected: _Collected,
) -> None:
    feed = make_feed(graph, scenario, call, sequences, thought)
    names = [info.name for info in graph.outputs]
    outputs = dict(zip(names, session.run(names, {**feed.inputs, **caches.inputs(call, sequences)}), strict=True))
    caches.take(outputs, sequences)
    for name in (contract.THOUGHT, contract.LOGITS):
        if name in outputs:
            flat = outputs[name].reshape(-1, outputs[name].shape[-1])
            # Packed graphs give logits for the rows asked for, one behind another; all else stands as the late rows do.
            at = (
                _dense(feed.late_at)
                if name == contract.LOGITS and graph.dialect == contract.ONNXRUNTIME
                else feed.late_at
            )
            for s, rows in zip(sequences, at, strict=True):
                collected.rows[name][s, call.lates[s]] = flat[list(rows)]


def _dense(late_at: Sequence[Sequence[int]]) -> list[range]:
    """The same counts, numbered one behind another."""
    ends = np.cumsum([len(rows) for rows in late_at])
    return [range(int(end) - len(rows), int(end)) for end, rows in zip(ends, late_at, strict=True)]


class _Collected:
    """Rows by sequence and position."""

    def __init__(self, graph: GraphInfo, scenario: Scenario) -> None:
        self.rows: dict[str, Array] = {}
        for info in graph.outputs:
            if info.name in (contract.THOUGHT, contract.LOGITS):
                width = info.dims[-1]
                assert isinstance(width, int), f"{info.name} has a fixed last dimension"
                self.rows[info.name] = np.zeros((*scenario.ids.shape, width), np.float32)

    def outcome(self) -> Outcome:
        return Outcome(thought=self.rows.get(contract.THOUGHT), logits=self.rows.get(contract.LOGITS), caches={})


class _Caches:
    """KV rows of every sequence by (layer, kind), put together for a run as the graph's inputs want them."""

    def __init__(self, graph: GraphInfo, cycle: CycleInfo, scenario: Scenario) -> None:
        self._scenario = scenario
        self._late_only = graph.name == contract.LATE_DECODE
        self._late_layers = set(cycle.decoding_range)
        self._slots = slots_of(graph, len(scenario.lengths))
        self._inputs = [info for info in graph.inputs if contract.cache_name(info.name)]
        self._rng = np.random.default_rng(1)
        longest = max((math.prod(self._shape(info)) for info in self._inputs), default=0)
        self._numbers = self._rng.standard_normal(NOISE_STARTS + longest).astype(np.float32)
        self._rows: dict[tuple[int, int, str], Array] = {}
        for info in self._inputs:
            layer, kind, _ = _parts(info.name)
            for s in range(len(scenario.lengths)):
                self._rows[s, layer, kind] = self._noise(info)[0]

    def inputs(self, call: Call, sequences: Sequence[int]) -> dict[str, Array]:
        """Caches of a run, [batch, kv_heads, capacity, head_dim]; noise in every row that the run must write or not see."""
        made: dict[str, Array] = {}
        for info in self._inputs:
            layer, _, slot = _parts(info.name)
            writes = call.lates if self._late_only or layer in self._late_layers else call.windows
            if info.dims[0] == "batch":
                made[info.name] = np.stack([self._held(s, info, writes) for s in sequences])
                continue
            own = next((s for s in sequences if slot is None or slot == self._slots[s]), None)
            made[info.name] = self._noise(info) if own is None else self._held(own, info, writes)[None]
        return made

    def take(self, outputs: dict[str, Array], sequences: Sequence[int]) -> None:
        """Keep what a run wrote for its sequences."""
        for info in self._inputs:
            layer, kind, slot = _parts(info.name)
            output = outputs[contract.present(layer, kind, slot)]
            for index, s in enumerate(sequences):
                if info.dims[0] == "batch":
                    self._rows[s, layer, kind] = np.array(output[index])
                elif slot is None or slot == self._slots[s]:
                    self._rows[s, layer, kind] = np.array(output[0])

    def final(self) -> dict[tuple[int, str], Array]:
        """(layer, kind) -> [sequences, kv_heads, n, head_dim] of everything committed."""
        n, count = self._scenario.ids.shape[1], len(self._scenario.lengths)
        pairs = dict.fromkeys(_parts(info.name)[:2] for info in self._inputs)
        return {
            (layer, kind): np.stack([self._rows[s, layer, kind][:, :n] for s in range(count)]) for layer, kind in pairs
        }

    def _held(self, sequence: int, info: TensorInfo, writes: Sequence[range]) -> Array:
        """A sequence's cache [kv_heads, capacity, head_dim], noise from the first row on that a run writes."""
        layer, kind, _ = _parts(info.name)
        held, start = self._rows[sequence, layer, kind].copy(), writes[sequence].start
        held[:, start:] = self._noise(info)[0][:, start:]
        return held

    def _noise(self, info: TensorInfo) -> Array:
        """Arbitrary numbers in an input's shape: a piece of those drawn once, from anywhere."""
        shape, start = self._shape(info), int(self._rng.integers(NOISE_STARTS))
        numbers = self._numbers[start : start + math.prod(shape)].reshape(shape)
        return (numbers * INT8_NOISE if info.dtype == "int8" else numbers).clip(*LIMITS).astype(info.dtype)

    def _shape(self, info: TensorInfo) -> list[int]:
        symbols = {"batch": 1, "capacity": self._scenario.capacity}
        return [symbols[dim] if isinstance(dim, str) else dim for dim in info.dims]


def _parts(name: str) -> contract.CacheName:
    parts = contract.cache_name(name)
    assert parts, f"{name} is no KV name"
    return parts
