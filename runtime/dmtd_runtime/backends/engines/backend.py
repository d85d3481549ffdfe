"""The backend over engines: TensorRT or TensorRT-RTX on a GPU, or the same engine graphs on the simulator.

Two ways through it. :meth:`TensorRtBackend.run` takes one step of any kind, as every backend does: prompts, steps whose
logits the caller wants, and what brings sequences to a common head. :meth:`start_cycle` enqueues a whole cycle, replayed as
one graph where graphs are on, and :meth:`finish_cycle` waits for its tokens; two may be under way, so that the device has
work while the caller looks at tokens.

The device does the work (``dmtd_runtime.device``), ``EngineSet`` holds what stays in place, ``CycleProgram`` knows a cycle.
Here are the choices of bucket, the uploads, and what is remembered of every slot.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmtd_runtime.backends.base import Array, BackendOptions, FullPass, Rows, RunOutput, RunStats, SlotCycle, SlotStep
from dmtd_runtime.backends.engines.device_cycle import CHOSEN, CycleProgram, CycleShape, control_layout, results_layout
from dmtd_runtime.backends.engines.engine_set import TABLES, EngineSet
from dmtd_runtime.backends.engines.limits import check_limits, visible_rows
from dmtd_runtime.backends.engines.warm_up import Reach
from dmtd_runtime.backends.layouts.blocks import BlockLayout
from dmtd_runtime.backends.layouts.rectangular import RectangularLayout
from dmtd_runtime.backends.staging import Staging
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import GraphName
from dmtd_runtime.bundle.engine_record import EngineRecord, PassKind
from dmtd_runtime.bundle.manifest import DTYPE_BYTES, Manifest
from dmtd_runtime.cycle import StepKind
from dmtd_runtime.device.base import Address, Device, Mark
from dmtd_runtime.errors import BackendError
from dmtd_runtime.sampling.sampler import NOT_FINITE, Sampler

logger = logging.getLogger("dmtd.tensorrt")

CYCLES_UNDER_WAY = 2  # at most, with a buffer of their own each


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnderWay:
    """A cycle that was enqueued: where its tokens will be, and how to know."""

    program: CycleProgram
    results: Array
    slots: tuple[int, ...]
    mark: Mark


class TensorRtBackend:
    """Runs a bundle's engines. See :class:`dmtd_runtime.backends.base.Backend`."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        options: BackendOptions,
        *,
        device: Device,
        directory: Path,
        record: EngineRecord,
    ) -> None:
        """``directory`` holds the engines that ``record`` describes; ``device`` is closed with the backend.

        Raises:
            RequestError: more sequences or tokens than the engines were built for.
            BackendError: too little device memory, or an engine that the device does not take.
        """
        check_limits(options, record)
        self._device, self._record, self._manifest = device, record, manifest
        self.slots = options.max_num_seqs
        self.max_model_len = options.max_model_len or record.max_model_len
        self.capacity = record.capacity
        self.max_rows = record.prefill_chunk
        self.full_pass: FullPass | None = record.full_pass_for(options.full_pass, manifest)
        self.stats = RunStats()
        self.runs_cycles = self.runs_ahead = True
        self.gives_all_rows = False
        self._graphs = options.cuda_graphs
        self._tau = manifest.cycle.cycle_length
        self._vocab_size = manifest.model.vocab_size
        self._engines = EngineSet(
            device,
            bundle,
            directory,
            manifest,
            record,
            full_pass=self.full_pass,
            max_num_seqs=self.slots,
            max_rows=self.max_rows,
        )
        self._layouts = {batch: RectangularLayout(batch, self.max_rows) for batch in range(1, self.slots + 1)}
        self._programs: dict[CycleShape, CycleProgram] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._counted: list[tuple[Sampler, int] | None] = [None] * self.slots
        self._busy_since = time.perf_counter()
        self._idle_since: float | None = None  # when the last cycle ended, where nothing but another one followed
        self._copies = self._engines.row_copies()
        self._allocate()

    def _allocate(self) -> None:
        largest = [
            CycleShape(batch=self.slots, visible_len=0, full=full, window_len=window, sampled=True)
            for full, window in (((True,) * self._tau, 1), ((True, *(False,) * (self._tau - 1)), self._tau))
        ]
        rows = {"batch": self.slots, "window_len": self.max_rows, "late_len": self.max_rows, "num_logits": 1}
        control = max(*(control_layout(shape).num_bytes for shape in largest), self._step_layout(rows).num_bytes)
        results = max(results_layout(shape).num_bytes for shape in largest)
        logits = self.slots * self._vocab_size * DTYPE_BYTES["float32"]
        device = self._device
        self._control, self._results = device.alloc(control, "inputs"), device.alloc(results, "results")
        for address, count in ((self._control, control), (self._results, results)):
            device.zero(address, count)
        self._control_staging, self._results_staging = (
            Staging(device, count, CYCLES_UNDER_WAY) for count in (control, results)
        )
        self._host_logits = device.alloc_host(logits).view(np.float32).reshape(self.slots, self._vocab_size)
        self._tables = BlockLayout.of(
            [(name, (self._vocab_size,), info.dtype) for name in TABLES if (info := self._engines.input_info(name))]
        )
        self._host_tables = device.alloc_host(self._tables.num_bytes)
        device.wait(device.mark())

    def run(
        self, steps: Sequence[SlotStep], committed: Sequence[int], *, choose: bool = False, rows: Rows = "last"
    ) -> RunOutput:
        assert not self._under_way, "a step runs when no cycle is under way"
        if rows != "last":
            raise BackendError(
                "engines give the logits of last rows alone; score the bundle with --backend onnxruntime"
            )
        self._begin()
        found, rows_of = [], list(committed)
        for part in self._layouts[self.slots].split(steps):
            found.append(self._run_part(part, rows_of, choose))
            for s in part:  # a later part writes padding behind what this one wrote
                rows_of[s.slot] = s.step.late.stop
        self._end()
        together = found[0] if len(found) == 1 else np.concatenate(found)
        return RunOutput(tokens=together) if choose else RunOutput(logits=together)

    def warm_up(self) -> None:
        """Run everything that ``warm_up.py`` lists, over padding alone, and zero what it wrote."""
        assert self.stats == RunStats(), "warming up comes before the first sequence"
        longest = self._record.bucket_for(min(self.capacity, self.max_model_len + self.max_rows))
        reach = Reach(
            batches=sorted({self._batch_for(slot) for slot in range(self.slots)}),
            lengths=[length for length in self._record.length_buckets if length <= longest],
            max_rows=self.max_rows,
            cycle_length=self._tau,
        )
        for step in reach.steps():
            sizes = {graph: step.sizes(graph) for graph in self._graphs_of(step.kind)}
            self._run_graphs(step.kind, sizes, step.visible_len, lambda graph, arrays: None)
        for batch in reach.batches:
            self._choose(batch)
        for shape in reach.cycles():
            program, staging = self._program_of(shape), self._control_staging.take()
            program.fill(program.control.views(staging), (), ())
            self._device.upload(self._control, staging[: program.control.num_bytes])
            self._control_staging.used()
            for _ in range(2 if self._graphs else 1):
                self._enqueue(program)
            self._device.wait(self._device.mark())
        self._engines.zero_buffers()
        self._device.wait(self._device.mark())

    def _run_part(self, steps: Sequence[SlotStep], committed: Sequence[int], choose: bool) -> Array:
        """Steps of one kind: tokens of those that want logits, or the logits; valid until the next call."""
        kind = steps[0].step.kind
        batch = self._batch_for(steps[-1].slot)
        layout = self._layouts[batch]
        sizes = {graph: layout.sizes(graph, steps) for graph in self._graphs_of(kind)}
        longest = max(max(s.get("window_len", 0), s["late_len"]) for s in sizes.values())
        visible_len = self._record.bucket_for(visible_rows(steps, committed[:batch], longest))
        self._run_graphs(kind, sizes, visible_len, lambda graph, arrays: layout.fill(graph, arrays, steps, committed))
        self._count(steps)
        wanted = [s.slot for s in steps if s.step.wants_logits]
        if not wanted:
            self._device.wait(self._device.mark())
            return np.zeros(0, np.int64) if choose else np.zeros((0, self._vocab_size), np.float32)
        found: Array = self._choose(batch)[wanted] if choose else self._download_logits(batch)[wanted]
        return found

    def _graphs_of(self, kind: StepKind) -> Sequence[GraphName]:
        """The graphs of a single step, in their order."""
        if kind == "late":
            return (contract.LATE_DECODE,)
        fused = self._engines.has_engine(contract.FULL_PASS)
        return (contract.FULL_PASS,) if fused else (contract.THINKING, contract.LATE_DECODE)

    def _run_graphs(
        self,
        kind: StepKind,
        sizes: Mapping[GraphName, Mapping[str, int]],
        visible_len: int,
        fill: Callable[[GraphName, Mapping[str, Array]], None],
    ) -> None:
        """Enqueue a single step: its inputs, which ``fill`` writes over zeros, and its graphs."""
        block = self._step_layout({name: size for each in sizes.values() for name, size in each.items()}, tuple(sizes))
        staging = self._control_staging.take()
        staging[: block.num_bytes] = 0  # what a layout leaves as it is, and what lies between the arrays
        views = block.views(staging)
        for graph in sizes:
            fill(graph, {name.partition(":")[2]: view for name, view in views.items() if name.startswith(f"{graph}:")})
        self._device.upload(self._control, staging[: block.num_bytes])
        self._control_staging.used()
        for graph in sizes:
            pass_kind: PassKind = (
                "prefill" if kind == "prefill" else "step" if graph == contract.LATE_DECODE else "refill"
            )
            context = self._engines.context(graph, pass_kind, {**sizes[graph], "visible_len": visible_len})
            for name in block.regions:
                if name.startswith(f"{graph}:"):
                    context.set_address(name.partition(":")[2], block.address(self._control, name))
            context.enqueue()

    def start_cycle(self, slots: Sequence[SlotCycle], committed: Sequence[int], *, follows: bool = False) -> None:
        assert len(self._under_way) < CYCLES_UNDER_WAY, f"{CYCLES_UNDER_WAY} cycles are under way"
        self._begin()
        waited_since, self._idle_since = self._idle_since, None
        program = self._program(slots, committed)
        if follows:
            last = self._under_way[-1]
            assert last.program.shape.batch == program.shape.batch, "a following cycle has the batch of the one before"
            assert last.slots == tuple(s.slot for s in slots), "a following cycle has the slots of the one before"
            window = program.shape.window_len
            assert all(len(s.steps[0].window) == window for s in slots), "a following window holds the cycle's tokens"
        if program.shape.sampled:
            self._update_tables(slots)
        staging = self._control_staging.take()
        program.fill(program.control.views(staging), slots, committed)
        first = program.control_from if follows else 0
        self._device.upload(Address(self._control + first), staging[first : program.control.num_bytes])
        self._control_staging.used()
        self._enqueue(program)
        if waited_since is not None and not self._under_way:
            self.stats.host_seconds += time.perf_counter() - waited_since
        results = self._results_staging.take()[: program.results.num_bytes]
        self._device.download(results, self._results)
        mark = self._results_staging.used()
        self._under_way.append(
            _UnderWay(program=program, results=results, slots=tuple(s.slot for s in slots), mark=mark)
        )
        full = sum(program.shape.full)
        self.stats.cycles += 1
        self.stats.full_passes += full
        self.stats.late_steps += len(program.shape.full) - full
        self.stats.refill_rows += sum(len(step.window) - 1 for s in slots for step in s.steps if step.window)

    def finish_cycle(self) -> RunOutput:
        cycle = self._under_way.popleft()
        self._device.wait(cycle.mark)
        found = cycle.program.chosen(cycle.program.results.views(cycle.results), cycle.slots)
        if not self._under_way:
            self._end()
            self._idle_since = time.perf_counter()
        return found

    def clear(self, slot: int, rows: int) -> None:
        self._engines.clear_slot(slot)

    def move(self, source: int, target: int, rows: int) -> None:
        self._engines.move_rows(source, target, rows)

    def read_rows(self, slot: int, rows: range) -> list[Array]:
        return self._copies.read_rows(slot, rows)

    def write_rows(self, slot: int, first: int, values: Array) -> None:
        self._copies.write_rows(slot, first, values)

    def close(self) -> None:
        self._programs.clear()
        self._device.close()

    def _enqueue(self, program: CycleProgram) -> None:
        """Run a cycle: call by call the first time, which also warms its contexts up, then as one captured graph."""
        if not (self._graphs and program.has_run):
            program.enqueue()
            program.has_run = True
            return
        if program.capture is None:
            self._device.wait(self._device.mark())
            try:
                if refusing := self._engines.uncapturable(program.shape):
                    raise BackendError(f"{refusing} cannot be captured into a CUDA graph")
                program.capture = self._device.capture(program.enqueue)
            except BackendError as error:
                logger.warning("cycles run without CUDA graphs: %s", error)
                self._graphs = False
                program.enqueue()
                return
        self._device.replay(program.capture)

    def _program(self, slots: Sequence[SlotCycle], committed: Sequence[int]) -> CycleProgram:
        """The program for the batch and length buckets of these slots."""
        full = tuple(step.kind == "full" for step in slots[0].steps)
        window = self._tau if not all(full) or self._tau == 1 else 1
        batch = self._batch_for(max(s.slot for s in slots))
        ends = [max(s.steps[-1].late.stop, s.steps[0].window.start + window) for s in slots]
        needed = max(*ends, max(committed[:batch]) + window)
        shape = CycleShape(
            batch=batch,
            visible_len=self._record.bucket_for(needed),
            full=full,
            window_len=window,
            sampled=any(s.sampler.needs_logits for s in slots),
        )
        return self._program_of(shape)

    def _program_of(self, shape: CycleShape) -> CycleProgram:
        if shape not in self._programs:
            self._programs[shape] = CycleProgram(self._engines, shape, self._control, self._results)
        return self._programs[shape]

    def _batch_for(self, last_slot: int) -> int:
        """The batch bucket that takes the slots up to ``last_slot``."""
        return min((size for size in (*self._record.batch_buckets, self.slots) if size > last_slot), default=self.slots)

    def _step_layout(self, sizes: Mapping[str, int], graphs: Sequence[GraphName] | None = None) -> BlockLayout:
        """The inputs of single steps that change: those of each graph, by "graph:input"."""
        wanted = graphs or self._engines.graphs
        return BlockLayout.of(
            (f"{graph}:{info.name}", [sizes[dim] if isinstance(dim, str) else dim for dim in info.dims], info.dtype)
            for graph in wanted
            for info in self._engines.changing_inputs(graph)
        )

    def _choose(self, batch: int) -> Array:
        """Arg-max of each row of the logits, int64 [batch]; negative where a row is not finite."""
        shape = CycleShape(batch=batch, visible_len=0, full=(True,), window_len=1, sampled=False)
        layout = results_layout(shape)
        context = self._engines.context(contract.CHOOSE_TOKEN, "choose", {"batch": batch, "num_logits": 1})
        for name in CHOSEN:
            context.set_address(name, layout.address(self._results, f"{name}.0"))
        context.enqueue()
        results = self._results_staging.take()[: layout.num_bytes]
        self._device.download(results, self._results)
        self._device.wait(self._results_staging.used())
        arrays = layout.views(results)
        finite, ids = arrays[f"{contract.IS_FINITE}.0"], arrays[f"{contract.TOKEN_IDS}.0"]
        chosen: Array = np.where(finite, ids, NOT_FINITE)[:, 0]
        return chosen

    def _download_logits(self, batch: int) -> Array:
        logits = self._host_logits[:batch]
        self._device.download(logits, self._engines.buffer(contract.LOGITS))
        self._device.wait(self._device.mark())
        return logits

    def _update_tables(self, slots: Sequence[SlotCycle]) -> None:
        """Upload bias, masks and counts of the sequences that are new to their slots, or were stepped outside of cycles."""
        tables = self._tables.views(self._host_tables)
        for s in slots:
            known, now = self._counted[s.slot], s.sampler.num_chosen + s.unseen
            self._counted[s.slot] = (s.sampler, now + len(s.steps))
            if known is not None and known[0] is s.sampler and known[1] == now:
                continue
            assert not s.unseen, "tables are uploaded when every token has been seen"
            s.sampler.fill_tables(tables)
            for name, table in tables.items():
                row = Address(self._engines.buffer(name) + s.slot * table.nbytes)
                self._device.upload(row, table)
            self._device.wait(self._device.mark())

    def _count(self, steps: Sequence[SlotStep]) -> None:
        kind = steps[0].step.kind
        self.stats.late_steps += kind == "late"
        self.stats.full_passes += kind != "late"
        self.stats.prefill_passes += kind == "prefill"
        for s in steps:
            self.stats.refill_rows += len(s.step.window) - len(s.step.late) if s.step.window else 0

    def _begin(self) -> None:
        if not self._under_way:
            self._busy_since = time.perf_counter()

    def _end(self) -> None:
        self._idle_since = None
        self.stats.session_seconds += time.perf_counter() - self._busy_since
