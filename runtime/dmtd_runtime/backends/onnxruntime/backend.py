"""The ONNX Runtime backend: sessions over a bundle's graphs, caches updated in place, one binding for each shape.

On the CPU one graph runs all where a bundle has it (``cycle_parts.py``), whole cycles of the likeliest tokens in one go.
Elsewhere a full pass runs staged by default: thinking over T's window, then late_decode over D's rows, ``thought`` handed over
in a buffer both are bound to. How rows are laid out depends on the dialect: ``layouts/packed.py`` (onnxruntime) or
``layouts/rectangular.py`` (standard). Where tensors lie is ``memory.py``'s: on a GPU everything is allocated when the backend is
made, all sessions share one stream and one copy of the weights, and a step waits once, for what it brings back.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime.backends.base import (
    Array,
    BackendOptions,
    Rows,
    RunOutput,
    RunStats,
    SlotCycle,
    SlotStep,
    StepwiseBackend,
)
from dmtd_runtime.backends.kv_cache import HostKvCache
from dmtd_runtime.backends.layouts.layout import Layout
from dmtd_runtime.backends.layouts.packed import PackedLayout
from dmtd_runtime.backends.layouts.rectangular import RectangularLayout
from dmtd_runtime.backends.onnxruntime.binding import Binding, SharedIo, check_io
from dmtd_runtime.backends.onnxruntime.cycle_parts import CycleParts
from dmtd_runtime.backends.onnxruntime.gpu_kv_cache import GpuKvCache
from dmtd_runtime.backends.onnxruntime.host_cycles import HostCycles, OnLogits
from dmtd_runtime.backends.onnxruntime.limits import (
    check_dtype,
    cycle_graph,
    graph_slots,
    max_model_len,
    runs_in_one_go,
    runs_own_products,
    usual_full_pass,
)
from dmtd_runtime.backends.onnxruntime.memory import (
    Buffer,
    GpuMemory,
    OrtMemory,
    host_buffer,
    open_memory,
    small_tensors,
)
from dmtd_runtime.backends.onnxruntime.prepared import PreparedGraph, PreparedRun, PreparedRuns
from dmtd_runtime.backends.onnxruntime.sizes import OrtSizes
from dmtd_runtime.backends.onnxruntime.trial import captures_agree, warm_up_steps
from dmtd_runtime.backends.onnxruntime.weights import mapped_weights, upload_weights
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest, TensorInfo
from dmtd_runtime.device.base import check_room
from dmtd_runtime.machine.huge_pages import in_huge_pages
from dmtd_runtime.machine.memory import return_freed_memory
from dmtd_runtime.ort.session import CudaOptions, open_session
from dmtd_runtime.sampling.sampler import NOT_FINITE, best_tokens

logger = logging.getLogger("dmtd.onnxruntime")

ROOM_HINT = "lower --max-model-len or --max-num-seqs, or free the device"


class OnnxRuntimeBackend(StepwiseBackend):
    """Runs a bundle in ONNX Runtime. See :class:`dmtd_runtime.backends.base.Backend`."""

    def __init__(self, directory: Path, manifest: Manifest, options: BackendOptions) -> None:
        check_dtype(manifest, options)
        self._manifest = manifest
        self._options = options
        dialect = options.dialect or manifest.default_dialect
        packed = dialect == contract.ONNXRUNTIME
        num_slots = graph_slots(manifest, options) if packed else 1
        on_gpu = options.device == "cuda"
        self.slots = options.max_num_seqs
        self.max_model_len = max_model_len(manifest, options)
        self.max_rows = manifest.model.max_window
        self.capacity = self.max_model_len + manifest.model.max_window
        self.stats = RunStats()
        one = cycle_graph(manifest, options, packed=packed, slots=num_slots)
        self.full_pass = None if one is not None else usual_full_pass(manifest, options, packed=packed)
        fused = self.full_pass == "fused"
        self.gives_all_rows = True
        self._captures = on_gpu and options.cuda_graphs
        self._rides = packed and not fused and not on_gpu  # prompts run through T beside the heads
        constant_total = self.capacity if self._captures else None
        self._layout: Layout = (
            PackedLayout(num_slots, constant_total=constant_total, few_shapes=on_gpu)
            if packed
            else RectangularLayout(self.slots)
        )
        self._cache_slots = max(num_slots, self.slots)
        self._caches: HostKvCache | GpuKvCache | None = None
        self._outputs: dict[str, Buffer] = {}
        # Where prompts may ride, E runs as it does beside them: with the window, and again for the rows of D. Bits stay the same.
        joins = one is not None and (num_slots == 1 or not manifest.cycle.encoding_layers)
        self._runs = PreparedRuns(self._layout, self._bind, fused=fused, rides=self._rides, joins=joins)
        self._ios: dict[tuple[contract.GraphName, range, int], SharedIo] = {}
        self._cycle = RunOutput()
        self._choosers: dict[tuple[int, ...], Binding] = {}
        self._graph_ids = itertools.count()
        first = contract.FULL_PASS if fused else contract.THINKING
        self._parts = None if one is None else CycleParts(one, manifest.cycle)
        self._cycles: HostCycles | None = None
        alone = fused and options.plain and not on_gpu  # a GPU is warmed up by late steps, too
        in_one_go = packed and runs_in_one_go(manifest, plain=options.plain)
        self.runs_cycles = in_one_go and (alone or one is not None)
        if one is not None:
            self._graphs = {contract.CYCLE: one}
        else:
            self._graphs = {first: manifest.graph(first, dialect, num_slots)}
            if not alone:
                self._graphs[contract.LATE_DECODE] = manifest.graph(contract.LATE_DECODE, dialect)
        if on_gpu:
            self._graphs[contract.CHOOSE_TOKEN] = manifest.graph(contract.CHOOSE_TOKEN, contract.STANDARD)
        self._sizes = OrtSizes(
            manifest=manifest,
            graphs=tuple(self._graphs.values()),
            slots=self._cache_slots,
            capacity=self.capacity,
            packed=packed,
            prompts_ride=self._rides,
        )
        self._sessions: dict[contract.GraphName, Any] = {}
        self._weights: Mapping[str, Any] = {}
        self._folded: Mapping[str, Any] = {}  # on a GPU: weights of the host, which reach it in constants alone
        self._memory = self._open_memory()
        if self.runs_cycles:
            most, slots = 1 if self._parts is None else self._parts.most_steps, self._cache_slots
            self._cycles = HostCycles(self._layout, self._bind, most_steps=most, slots=slots, joins=fused or joins)
        try:
            self._open(directory)
        except BaseException:
            self.close()
            raise

    def run(
        self, steps: Sequence[SlotStep], committed: Sequence[int], *, choose: bool = False, rows: Rows = "last"
    ) -> RunOutput:
        found, fed = list[Array](), [*committed, *(0,) * (self._cache_slots - len(committed))]
        runs = self._runs.of(steps, rows, captured=self._captures)
        several = len(runs) > 1 or len(runs[0].graphs) > 2  # that give logits, each in the place of the one before
        for run in runs:
            for logits in self._run_prepared(run, steps, fed, choose=choose):
                found.append(logits.copy() if several else logits)
            if len(runs) > 1:  # a later one writes padding behind what this one wrote
                for place in itertools.chain(*(graph.places for graph in run.graphs)):
                    fed[steps[place].slot] = steps[place].step.late.stop
        together = found[0] if len(found) == 1 else np.concatenate(found)
        return RunOutput(tokens=together) if choose else RunOutput(logits=together)

    def start_cycle(self, slots: Sequence[SlotCycle], committed: Sequence[int], *, follows: bool = False) -> None:
        assert self._cycles is not None and not follows, "a cycle is over once it has been started"
        self._cycle = self._cycles.run(slots, committed, self.stats)

    def finish_cycle(self) -> RunOutput:
        return self._cycle

    def watch_cycles(self, on_logits: OnLogits) -> None:
        """Be told of the logits of every step that runs with others in one go, which nobody else sees."""
        assert self._cycles is not None, "the cycle graph runs"
        self._cycles.on_logits = on_logits

    def clear(self, slot: int, rows: int) -> None:
        self._open_caches.clear(slot, min(self.capacity, rows + self.max_rows))

    def move(self, source: int, target: int, rows: int) -> None:
        self._open_caches.move(source, target, rows)

    def read_rows(self, slot: int, rows: range) -> list[Array]:
        return self._open_caches.read_rows(slot, rows)

    def write_rows(self, slot: int, first: int, values: Array) -> None:
        self._open_caches.write_rows(slot, first, values)

    def warm_up(self) -> None:
        """Run every common shape once: a GPU builds plans and captures graphs at their first use. The host does neither."""
        if self._memory.stream is None:
            return
        tau = self._manifest.cycle.cycle_length
        for steps in warm_up_steps(tau, self.slots, self.max_rows):
            committed = [0] * self.slots
            for s in steps:
                committed[s.slot] = s.step.late.start
            self.run(steps, committed, choose=True)
        for slot in range(self.slots):
            self.clear(slot, self.capacity)
        self.stats = RunStats()

    def close(self) -> None:
        for owned in (self._runs, self._ios, self._choosers, self._outputs, self._sessions):
            owned.clear()
        self._cycles = None
        self._weights, self._folded = {}, {}
        if self._caches is not None:
            self._caches.close()
        self._memory.close()

    @property
    def _open_caches(self) -> HostKvCache | GpuKvCache:
        assert self._caches is not None, "an open backend has caches"
        return self._caches

    def _open_memory(self) -> OrtMemory:
        """The device's memory, once it is known to hold what the backend allocates."""
        memory = open_memory(self._options)
        try:
            if isinstance(memory, GpuMemory):
                check_room(memory.cuda, self._sizes.needed_bytes(), ROOM_HINT)
        except BaseException:
            memory.close()
            raise
        return memory

    def _open(self, directory: Path) -> None:
        """Allocate what stays where it is, and open the sessions: on a GPU over one copy of the weights."""
        for graph in self._graphs.values():
            self._memory.reserve(graph.name, small_tensors(graph, self._sizes.symbols))
        for name, shape in self._sizes.outputs.items():
            dtype = self._manifest.model.dtype if name == contract.THOUGHT else "float32"
            self._outputs[name] = self._memory.zeros(shape, dtype, name)
        if self._parts is not None:
            self._outputs[contract.NEW_THOUGHT] = self._outputs[contract.THOUGHT]
        names = list(self._graphs)
        if isinstance(self._memory, GpuMemory):
            self._sizes.warn_of_copies()
            self._caches = GpuKvCache(self._manifest.model, self._cache_slots, self.capacity, self._memory)
            names.remove(contract.CHOOSE_TOKEN)
            chooser = self._session(directory, contract.CHOOSE_TOKEN)
            graphs = [self._graphs[name] for name in names]
            self._weights = upload_weights(directory, self._manifest, graphs, self._memory, chooser)
            self._folded = mapped_weights(directory, self._manifest, graphs, folded=True)
        else:
            self._caches = HostKvCache(self._manifest.model, self._cache_slots, self.capacity)
            self._weights = mapped_weights(directory, self._manifest, self._graphs.values())
        with contextlib.nullcontext() if isinstance(self._memory, GpuMemory) else in_huge_pages():
            for name in names:
                self._session(directory, name)
            return_freed_memory()  # before it is moved
        if self._captures:
            self._captures = captures_agree(self._trial, self._manifest.cycle.cycle_length, self.capacity)
            self.clear(0, self.capacity)
            self.stats = RunStats()
            if not self._captures:
                logger.warning("captured graphs give other numbers on this GPU: steps run without them")

    def _trial(self, step: SlotStep, captured: bool) -> Array:
        committed = [step.step.late.start, *(0,) * (self._cache_slots - 1)]
        [run] = self._runs.of([step], "last", captured=captured)
        return next(self._run_prepared(run, [step], committed)).copy()

    def _session(self, directory: Path, name: contract.GraphName) -> Any:
        graph = self._graphs[name]
        cuda = None
        if self._options.device == "cuda":
            captures = self._captures and name != contract.CHOOSE_TOKEN
            cuda = CudaOptions(device_id=self._options.device_id, stream=self._memory.stream, graphs=captures)
        self._sessions[name] = open_session(
            directory / graph.file,
            threads=self._options.threads,
            prepack=self._options.prepack,
            alone=len(self._graphs) == 1,
            kernels=runs_own_products(self._manifest, self._options),
            cuda=cuda,
            weights={weight: self._weights[weight] for weight in graph.weights if weight in self._weights},
            folded={weight: self._folded[weight] for weight in graph.weights if weight in self._folded},
        )
        check_io(self._sessions[name], graph)
        return self._sessions[name]

    def _run_prepared(
        self, run: PreparedRun, steps: Sequence[SlotStep], fed: Sequence[int], *, choose: bool = False
    ) -> Iterator[Array]:
        """Run the graphs: logits [n, vocab] of each that gives any, valid until the next is asked for, or with ``choose`` what
        the device chose, int64 [n].
        """
        stats = self.stats
        if run.late:
            stats.late_steps += 1
        else:
            stats.full_passes += 1
            stats.prefill_passes += run.prefill
            stats.refill_rows += run.refill_rows
        for graph in run.graphs:
            binding = graph.binding
            binding.begin()
            self._layout.fill(graph.name, binding.arrays, [steps[place] for place in graph.places], fed)
            binding.run(stats)
            if graph.index is not None:
                yield self._results(graph, choose)

    def _results(self, graph: PreparedGraph, choose: bool) -> Array:
        logits, start = graph.binding.buffers[contract.LOGITS], time.perf_counter()
        found: Array
        if not graph.wanted:
            self._memory.wait()
            found = np.zeros(0, np.int64) if choose else np.zeros((0, self._manifest.model.vocab_size), np.float32)
        elif not choose:
            found = self._memory.read(logits)[graph.index]
        elif contract.CHOOSE_TOKEN in self._sessions:
            found = self._choose(logits)[graph.index]
        else:
            found = best_tokens(self._memory.read(logits)[graph.index])
        if self._memory.stream is not None:  # what was enqueued above has run meanwhile
            self.stats.session_seconds += time.perf_counter() - start
        return found

    def _choose(self, logits: Buffer) -> Array:
        """Arg-max on the device, [batch, num_logits]; NOT_FINITE where a row is not."""
        if logits.shape not in self._choosers:
            sizes = {"batch": logits.shape[0], "num_logits": logits.shape[1]}
            session, graph = self._sessions[contract.CHOOSE_TOKEN], self._graphs[contract.CHOOSE_TOKEN]
            io = SharedIo(session, graph, {}, self._memory)
            binding = Binding(io, graph, sizes, {contract.LOGITS: logits}, self._memory)
            self._choosers[logits.shape] = binding
        binding = self._choosers[logits.shape]
        binding.run(self.stats)
        binding.block.pull()
        chosen: Array = np.where(binding.arrays[contract.IS_FINITE], binding.arrays[contract.TOKEN_IDS], NOT_FINITE)
        return chosen

    def _bind(
        self,
        name: contract.GraphName,
        sizes: Mapping[str, int],
        slots: range,
        captured: bool,
        thought_from: int,
        count: int = 1,
    ) -> Binding:
        """``count``: of the steps of D, where one run may have several."""
        parts = self._parts
        graph = self._graphs[name] if parts is None else parts.graph(name, count)
        io, buffers = self._io(name, graph, slots, captured, count), dict[str, Buffer]()
        for info in (*io.inputs, *io.outputs):
            if info.name in self._outputs:
                first = thought_from if info.name == contract.THOUGHT else 0
                buffers[info.name] = self._output_buffer(info, sizes, first)
        graph_id = None
        if self._options.device == "cuda" and self._options.cuda_graphs:  # the sessions were opened for captures
            graph_id = next(self._graph_ids) if captured else -1
        sizes = {**(parts.least if parts else {}), **sizes, "capacity": self.capacity}
        binding = Binding(io, graph, sizes, buffers, self._memory, graph_id=graph_id)
        if parts is not None:
            parts.direct(binding, name, count)
        return binding

    def _io(self, name: contract.GraphName, graph: GraphInfo, slots: range, captured: bool, count: int) -> SharedIo:
        """The graph's caches in place; a captured graph has an io binding of its own, whose addresses stay."""
        key = (name, slots, count)
        io = self._ios.get(key)
        if io is None or captured:
            caches = {
                info.name: self._cache_buffer(cache, info.dims[0], slots)
                for info in (*graph.inputs, *graph.outputs)
                if (cache := contract.cache_name(info.name))
            }
            session = self._sessions[contract.CYCLE if self._parts else name]
            io = SharedIo(session, graph, caches, self._memory)
            if not captured:
                self._ios[key] = io
        return io

    def _output_buffer(self, info: TensorInfo, sizes: Mapping[str, int], first: int = 0) -> Buffer:
        """The buffer of thought or logits in this shape, from row ``first`` on; one for all graphs."""
        output = info.name
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in info.dims]
        whole = self._outputs[output]
        needed, width = first * shape[-1] + math.prod(shape), whole.shape[-1]
        if needed > math.prod(whole.shape):  # all rows of a window, asked for by who scores text
            assert output == contract.LOGITS, f"{needed // width} rows of thought, there is room for {whole.shape[0]}"
            whole = self._outputs[output] = self._memory.zeros(shape, info.dtype, output)
            return whole
        return whole.rows(first, whole.shape[0] - first).prefix(shape)

    def _cache_buffer(self, cache: contract.CacheName, batch: int | str, slots: range) -> Buffer:
        """The part of a layer's cache that a KV input or output stands for; both names of a pair are one buffer."""
        held = self._open_caches.buffer(cache.layer, cache.kind)
        buffer = held if isinstance(held, Buffer) else host_buffer(held)
        if batch == "batch":
            return buffer.rows(slots.start, len(slots))
        return buffer.rows(cache.slot or 0, 1)
