"""The ONNX Runtime backend: sessions over a bundle's graphs, caches updated in place, one binding for each shape.

A full pass runs staged by default: thinking over T's window, then late_decode over D's rows, ``thought`` handed over in a
buffer both are bound to. How rows are laid out depends on the dialect: ``packed.py`` (onnxruntime) or
``rectangular.py`` (standard).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dmtd_runtime import contract
from dmtd_runtime.backends.base import Array, BackendOptions, RunStats, SlotStep
from dmtd_runtime.backends.ort_session import Binding, import_onnxruntime, is_cache, open_session
from dmtd_runtime.backends.packed import PackedLayout
from dmtd_runtime.backends.rectangular import RectangularLayout
from dmtd_runtime.errors import BackendError, RequestError
from dmtd_runtime.kv_cache import HostKvCache
from dmtd_runtime.manifest import GraphInfo, Manifest


class Layout(Protocol):
    """How the rows of several slots become the inputs of one graph."""

    def sizes(self, graph: contract.GraphName, steps: Sequence[SlotStep]) -> Mapping[str, int]:
        """Symbolic dimensions of the run; equal sizes share a binding."""
        ...

    def fill(
        self, graph: contract.GraphName, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]
    ) -> None:
        """Write every input of the run."""
        ...

    def logit_index(self, steps: Sequence[SlotStep]) -> Any:
        """Index of the wanted rows in the logits output."""
        ...


class OnnxRuntimeBackend:
    """Runs a bundle in ONNX Runtime. See :class:`dmtd_runtime.backends.base.Backend`."""

    def __init__(self, directory: Path, manifest: Manifest, options: BackendOptions) -> None:
        self._manifest = manifest
        self._cuda = options.device == "cuda"
        _check_dtype(manifest, options)
        dialect = options.dialect or _default_dialect(manifest)
        stored_slots = max((g.slots for g in manifest.graphs if g.dialect == dialect), default=1)
        packed = dialect == contract.ONNXRUNTIME
        if packed and options.max_batch > stored_slots:
            raise RequestError(
                f"max_batch: got {options.max_batch}, this bundle was exported for {stored_slots} (--max-batch)"
            )
        self.slots = options.max_batch
        graph_slots = (stored_slots if options.max_batch > 1 else 1) if packed else 1
        limit = manifest.model.max_model_len
        if options.max_model_len is not None and not 1 <= options.max_model_len <= limit:
            raise RequestError(f"max_model_len: got {options.max_model_len}, expected 1 to {limit}, the bundle's limit")
        self.max_model_len = options.max_model_len or limit
        self.max_rows = manifest.model.max_window
        self.capacity = self.max_model_len + manifest.model.max_window
        self.stats = RunStats()
        self._layout: Layout = PackedLayout(graph_slots) if packed else RectangularLayout(self.slots)
        self._graph_slots = graph_slots
        self._packed = packed
        self._cache = HostKvCache(manifest.model, graph_slots if packed else self.slots, self.capacity)
        self._device_cache: dict[str, Any] = {}
        self._fed = [0] * max(graph_slots, self.slots)
        self._fused = options.full_pass == "fused"
        names = (contract.FULL_PASS if self._fused else contract.THINKING, contract.LATE_DECODE)
        self._graphs = {name: manifest.graph(name, dialect, graph_slots) for name in names}
        self._sessions = {name: open_session(directory / graph.file, options) for name, graph in self._graphs.items()}
        self._bindings: dict[tuple[contract.GraphName, tuple[tuple[str, int], ...]], Binding] = {}
        self._shared: dict[tuple[str, int], tuple[Any, Array]] = {}

    def run(self, steps: Sequence[SlotStep]) -> Array:
        if steps[0].step.kind == "late":
            logits = self._run_graph(contract.LATE_DECODE, steps)
            self.stats.late_steps += 1
        else:
            if self._fused:
                logits = self._run_graph(contract.FULL_PASS, steps)
            else:
                self._run_graph(contract.THINKING, steps)
                logits = self._run_graph(contract.LATE_DECODE, steps)
            self.stats.full_passes += 1
            self.stats.refill_rows += sum(len(s.step.window) - len(s.step.late) for s in steps)
        for slot_step in steps:
            self._fed[slot_step.slot] = slot_step.step.late.stop
        rows: Array = logits[self._layout.logit_index(steps)]
        return rows

    def reset(self, slot: int, *, clear: bool = False) -> None:
        self._fed[slot] = 0
        if clear and not self._cuda:
            self._cache.clear(slot)

    def move(self, source: int, target: int) -> bool:
        if self._cuda:
            return False
        self._cache.move(source, target, self._fed[source])
        self._fed[target], self._fed[source] = self._fed[source], 0
        return True

    def close(self) -> None:
        self._bindings.clear()
        self._shared.clear()
        self._device_cache.clear()
        self._sessions.clear()
        self._cache.close()

    def _run_graph(self, name: contract.GraphName, steps: Sequence[SlotStep]) -> Array:
        """Fill, run, and return the logits output [1 or batch, num_logits, vocab] (thinking: its thought)."""
        sizes = self._layout.sizes(name, steps)
        key = (name, tuple(sizes.items()))
        binding = self._bindings.get(key)
        if binding is None:
            start = time.perf_counter()
            binding = self._bindings[key] = self._bind(name, sizes)
            self.stats.session_seconds += time.perf_counter() - start
        self._layout.fill(name, binding.arrays, steps, self._fed)
        binding.run(self.stats)
        output = contract.THOUGHT if name == contract.THINKING else contract.LOGITS
        value, array = self._shared_value(name, output, sizes)
        return value.numpy() if self._cuda else array

    def _bind(self, name: contract.GraphName, sizes: Mapping[str, int]) -> Binding:
        graph = self._graphs[name]
        shared = {
            info.name: self._cache_value(info.name) for info in (*graph.inputs, *graph.outputs) if is_cache(info.name)
        }
        for output in (contract.THOUGHT, contract.LOGITS):
            if any(info.name == output for info in (*graph.inputs, *graph.outputs)):
                shared[output] = self._shared_value(name, output, sizes)[0]
        return Binding(self._sessions[name], graph, {**sizes, "capacity": self.capacity}, shared, self._cuda)

    def _shared_value(self, name: contract.GraphName, output: str, sizes: Mapping[str, int]) -> tuple[Any, Array]:
        """The buffer of thought or logits for these sizes, one for both sessions."""
        info = _find(self._graphs[name], output)
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in info.dims]
        key = (output, int(np.prod(shape[:-1])))
        if key not in self._shared:
            ort = import_onnxruntime()
            array = np.zeros(shape, np.float32 if info.dtype == "bfloat16" else info.dtype)
            value = self._device_zeros(shape, info.dtype) if self._cuda else ort.OrtValue.ortvalue_from_numpy(array)
            self._shared[key] = (value, array)
        value, array = self._shared[key]
        return value, array

    def _cache_value(self, name: str) -> Any:
        """The OrtValue of a KV input or output: both names of a pair are one buffer."""
        _, layer, kind_name, *slot_name = name.split(".")
        key = ".".join((layer, kind_name, *slot_name))
        if key not in self._device_cache:
            ort = import_onnxruntime()
            kind: contract.Kind = "key" if kind_name == "key" else "value"
            buffer = self._cache.buffer(int(layer), kind)
            if self._packed:
                slot = int(slot_name[0]) if slot_name else 0
                buffer = buffer[slot : slot + 1]
            dtype = self._manifest.model.dtype
            on_gpu = self._cuda and self._device_zeros(list(buffer.shape), dtype)
            self._device_cache[key] = on_gpu or ort.OrtValue.ortvalue_from_numpy(buffer)
        return self._device_cache[key]

    def _device_zeros(self, shape: list[int], dtype: str) -> Any:
        ort = import_onnxruntime()
        if dtype == "bfloat16":  # numpy has no bfloat16: allocate by element type; ONNX's number for it is 16
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, 16, "cuda", 0)
            value.update_inplace(np.zeros(shape, np.uint16))
            return value
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cuda", 0)


def _find(graph: GraphInfo, name: str) -> Any:
    return next(info for info in (*graph.inputs, *graph.outputs) if info.name == name)


def _default_dialect(manifest: Manifest) -> contract.Dialect:
    dialects = {graph.dialect for graph in manifest.graphs}
    return contract.ONNXRUNTIME if contract.ONNXRUNTIME in dialects else contract.STANDARD


def _check_dtype(manifest: Manifest, options: BackendOptions) -> None:
    dtype = manifest.model.dtype
    if options.device == "cpu" and dtype == "bfloat16":
        raise BackendError(
            "this bundle is bfloat16, which ONNX Runtime cannot run on the CPU; "
            "export it with --dtype float32, or use --device cuda"
        )
    if options.device == "cuda" and dtype == "float32" and options.dialect != contract.STANDARD:
        raise BackendError(
            "this bundle is float32, and GroupQueryAttention on CUDA takes float16 or bfloat16 only; "
            "export it with --dtype bfloat16"
        )
