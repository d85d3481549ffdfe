"""The ONNX Runtime backend: sessions over a bundle's graphs, caches updated in place, one binding for each shape.

A full pass runs staged by default: thinking over T's window, then late_decode over D's rows, ``thought`` handed over in a
buffer both are bound to. How rows are laid out depends on the dialect: ``packed.py`` (onnxruntime) or
``rectangular.py`` (standard).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dmtd_runtime import contract
from dmtd_runtime.backends.base import Array, BackendOptions, RunStats, SlotStep, StepwiseBackend
from dmtd_runtime.backends.ort_session import (
    Binding,
    Buffer,
    device_buffer,
    host_buffer,
    open_session,
    shared_stream,
)
from dmtd_runtime.backends.packed import PackedLayout
from dmtd_runtime.backends.rectangular import RectangularLayout
from dmtd_runtime.engine_record import default_full_pass
from dmtd_runtime.errors import BackendError, RequestError
from dmtd_runtime.kv_cache import HostKvCache
from dmtd_runtime.manifest import Manifest


class Layout(Protocol):
    """How the rows of several slots become the inputs of one graph."""

    def split(self, steps: Sequence[SlotStep]) -> Sequence[Sequence[SlotStep]]:
        """The runs that these steps need: the parts that may go together."""
        ...

    def batch_slots(self, steps: Sequence[SlotStep]) -> range:
        """The slots that are the batch of the run."""
        ...

    def sizes(self, graph: contract.GraphName, steps: Sequence[SlotStep]) -> Mapping[str, int]:
        """Symbolic dimensions of the run; with equal sizes and batch slots, runs share a binding."""
        ...

    def fill(
        self, graph: contract.GraphName, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]
    ) -> None:
        """Write every input of the run; ``fed`` are the committed rows of all slots."""
        ...

    def logit_index(self, steps: Sequence[SlotStep]) -> Any:
        """Index of the wanted rows in the logits output."""
        ...


class OnnxRuntimeBackend(StepwiseBackend):
    """Runs a bundle in ONNX Runtime. See :class:`dmtd_runtime.backends.base.Backend`."""

    def __init__(self, directory: Path, manifest: Manifest, options: BackendOptions) -> None:
        _check_dtype(manifest, options)
        self._manifest = manifest
        self._options = options
        dialect = options.dialect or manifest.default_dialect
        packed = dialect == contract.ONNXRUNTIME
        graph_slots = _graph_slots(manifest, options) if packed else 1
        self.slots = options.max_batch
        self.max_model_len = _max_model_len(manifest, options)
        self.max_rows = manifest.model.max_window
        self.capacity = self.max_model_len + manifest.model.max_window
        self.stats = RunStats()
        self._layout: Layout = PackedLayout(graph_slots) if packed else RectangularLayout(self.slots)
        self._fed = [0] * max(graph_slots, self.slots)
        self._host_cache = (
            HostKvCache(manifest.model, len(self._fed), self.capacity) if options.device == "cpu" else None
        )
        self._dirty = False
        self._caches: dict[tuple[int, contract.Kind], Buffer] = {}
        self._outputs: dict[tuple[str, tuple[int, ...]], Buffer] = {}
        self._bindings: dict[tuple[contract.GraphName, range, tuple[tuple[str, int], ...]], Binding] = {}
        self._choosers: dict[tuple[int, ...], tuple[Binding, Array, Array]] = {}
        self.full_pass = options.full_pass or default_full_pass(manifest)
        first = contract.FULL_PASS if self.full_pass == "fused" else contract.THINKING
        self._graphs = {
            first: manifest.graph(first, dialect, graph_slots),
            contract.LATE_DECODE: manifest.graph(contract.LATE_DECODE, dialect),
        }
        on_gpu = options.device == "cuda"
        self.chooses_tokens = on_gpu if options.choose_on_device is None else options.choose_on_device
        if self.chooses_tokens:
            self._graphs[contract.CHOOSE_TOKEN] = manifest.graph(contract.CHOOSE_TOKEN, contract.STANDARD)
        # A graph that reads lengths on the host cannot be replayed with others: only the standard dialect's are captured.
        self._captures = on_gpu and options.cuda_graphs and not packed
        self._stream = shared_stream(options.device_id) if on_gpu else None
        self._sessions = {
            name: open_session(
                directory / graph.file,
                options,
                stream=self._stream,
                graphs=self._captures and name != contract.CHOOSE_TOKEN,
            )
            for name, graph in self._graphs.items()
        }

    def run(self, steps: Sequence[SlotStep], *, greedy: bool = False) -> Array:
        parts = self._layout.split(steps)
        if len(parts) == 1:
            return self._run_together(steps, greedy)
        return np.concatenate([self._run_together(part, greedy).copy() for part in parts])

    def reset(self, slot: int, *, clear: bool = False) -> None:
        if clear and self._host_cache is not None:
            self._host_cache.clear(slot, min(self.capacity, self._fed[slot] + self.max_rows))
        self._dirty |= clear and self._host_cache is None
        self._fed[slot] = 0
        if self._dirty and not any(self._fed):
            # A device's cache is zeroed whole, so once no slot is in use: before then nobody gets the slot again.
            for cache in self._caches.values():
                zeros = np.zeros(math.prod(cache.shape), np.uint16 if cache.dtype == "bfloat16" else cache.dtype)
                cache.owner.update_inplace(zeros)
            self._dirty = False

    def move(self, source: int, target: int) -> bool:
        if self._host_cache is None:
            return False
        self._host_cache.move(source, target, self._fed[source])
        self._fed[target], self._fed[source] = self._fed[source], 0
        return True

    def close(self) -> None:
        for owned in (self._bindings, self._choosers, self._outputs, self._caches, self._sessions):
            owned.clear()
        if self._host_cache is not None:
            self._host_cache.close()

    def _run_together(self, steps: Sequence[SlotStep], greedy: bool) -> Array:
        """Run the graphs of one step; returns logits [n, vocab], or with ``greedy`` what the device chose, int64 [n]."""
        late, fused = steps[0].step.kind == "late", self.full_pass == "fused"
        if not late and not fused:
            self._run_graph(contract.THINKING, steps, wait=self._stream is None)
        last = contract.LATE_DECODE if late or not fused else contract.FULL_PASS
        sizes = self._run_graph(last, steps)
        if late:
            self.stats.late_steps += 1
        else:
            self.stats.full_passes += 1
            self.stats.prefill_passes += steps[0].step.kind == "prefill"
            self.stats.refill_rows += sum(len(s.step.window) - len(s.step.late) for s in steps)
        for slot_step in steps:
            self._fed[slot_step.slot] = slot_step.step.late.stop
        wanted = self._layout.logit_index(steps)
        logits = self._output_buffer(last, contract.LOGITS, sizes)
        rows: Array
        if greedy and self.chooses_tokens:
            rows = self._choose(logits)[wanted]
        else:
            rows = (logits.owner.numpy() if logits.array is None else logits.array)[wanted]
        return rows

    def _run_graph(
        self, name: contract.GraphName, steps: Sequence[SlotStep], *, wait: bool = True
    ) -> Mapping[str, int]:
        """Fill and run a graph; returns the sizes of its symbolic dimensions."""
        sizes, slots = self._layout.sizes(name, steps), self._layout.batch_slots(steps)
        key = (name, slots, tuple(sizes.items()))
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bindings[key] = self._bind(name, sizes, slots, steps[0].step.kind == "prefill")
        self._layout.fill(name, binding.arrays, steps, self._fed)
        binding.run(self.stats, wait=wait)
        return sizes

    def _choose(self, logits: Buffer) -> Array:
        """Arg-max on the device, [batch, num_logits]; -1 where a row is not finite."""
        if logits.shape not in self._choosers:
            rows, graph = logits.shape[:2], self._graphs[contract.CHOOSE_TOKEN]
            token_ids, finite = host_buffer(np.zeros(rows, np.int64)), host_buffer(np.zeros(rows, np.bool_))
            buffers = {contract.LOGITS: logits, contract.TOKEN_IDS: token_ids, contract.IS_FINITE: finite}
            binding = Binding(self._sessions[contract.CHOOSE_TOKEN], graph, {}, buffers, self._options)
            self._choosers[logits.shape] = (binding, token_ids.owner, finite.owner)
        binding, ids, is_finite = self._choosers[logits.shape]
        binding.run(self.stats)
        chosen: Array = np.where(is_finite, ids, -1)
        return chosen

    def _bind(self, name: contract.GraphName, sizes: Mapping[str, int], slots: range, prefill: bool) -> Binding:
        graph = self._graphs[name]
        buffers: dict[str, Buffer] = {}
        for info in (*graph.inputs, *graph.outputs):
            if cache := contract.cache_name(info.name):
                buffers[info.name] = self._cache_buffer(cache, info.dims[0], slots)
            elif info.name in (contract.THOUGHT, contract.LOGITS):
                buffers[info.name] = self._output_buffer(name, info.name, sizes)
        graph_id = None
        if self._captures:  # prompts have too many shapes to keep a graph for each
            graph_id = -1 if prefill else len(self._bindings)
        sizes = {**sizes, "capacity": self.capacity}
        return Binding(self._sessions[name], graph, sizes, buffers, self._options, graph_id=graph_id)

    def _output_buffer(self, name: contract.GraphName, output: str, sizes: Mapping[str, int]) -> Buffer:
        """The buffer of thought or logits of this shape, one for both sessions."""
        info = next(i for i in (*self._graphs[name].outputs, *self._graphs[name].inputs) if i.name == output)
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in info.dims)
        if (output, shape) not in self._outputs:
            self._outputs[output, shape] = self._zeros(shape, info.dtype)
        return self._outputs[output, shape]

    def _cache_buffer(self, cache: contract.CacheName, batch: int | str, slots: range) -> Buffer:
        """The part of a layer's cache that a KV input or output stands for; both names of a pair are one buffer."""
        key = (cache.layer, cache.kind)
        if key not in self._caches:
            if self._host_cache is not None:
                self._caches[key] = host_buffer(self._host_cache.buffer(*key))
            else:
                model = self._manifest.model
                shape = (len(self._fed), model.num_kv_heads, self.capacity, model.head_dim)
                self._caches[key] = self._zeros(shape, model.dtype)
        if batch == "batch":
            return self._caches[key].rows(slots.start, len(slots))
        return self._caches[key].rows(cache.slot or 0, 1)

    def _zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        if self._options.device == "cuda":
            return device_buffer(shape, dtype, self._options.device_id)
        return host_buffer(np.zeros(shape, dtype))


def _graph_slots(manifest: Manifest, options: BackendOptions) -> int:
    """Slots of the packed graphs to load: the fewest that hold ``max_batch`` sequences."""
    stored = sorted({graph.slots for graph in manifest.graphs if graph.dialect == contract.ONNXRUNTIME})
    fitting = [slots for slots in stored if slots >= options.max_batch]
    if not fitting:
        most = max(stored, default=0)
        raise RequestError(
            f"max_batch: got {options.max_batch}, expected 1 to {most}, what the bundle was exported for; "
            f"export it with a larger --max-batch"
        )
    return fitting[0]


def _max_model_len(manifest: Manifest, options: BackendOptions) -> int:
    limit = manifest.model.max_model_len
    if options.max_model_len is not None and not 1 <= options.max_model_len <= limit:
        raise RequestError(f"max_model_len: got {options.max_model_len}, expected 1 to {limit}, the bundle's limit")
    return options.max_model_len or limit


def _check_dtype(manifest: Manifest, options: BackendOptions) -> None:
    dtype = manifest.model.dtype
    if options.device == "cpu" and dtype == "bfloat16":
        raise BackendError(
            "this bundle is bfloat16, which ONNX Runtime cannot run on the CPU; "
            "export it with --dtype float32, or use --device cuda"
        )
    if (
        options.device == "cuda"
        and dtype == "float32"
        and (options.dialect or manifest.default_dialect) == contract.ONNXRUNTIME
    ):
        raise BackendError(
            "this bundle is float32, and GroupQueryAttention on CUDA takes float16 or bfloat16 only; "
            "export it with --dtype bfloat16"
        )
