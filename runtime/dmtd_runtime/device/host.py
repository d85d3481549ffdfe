"""A device in host memory: the engine graphs run in ONNX Runtime, with real numbers, behind the rules of a GPU.

It is what tests run the TensorRT backend on where there is no GPU. The stream is lazy: nothing runs before somebody waits,
so a missing wait reads old numbers and a buffer that is rewritten too early is uploaded as it then is. What a GPU or
TensorRT does silently wrong raises :class:`SeamError` here, when the call is made or when the work runs:

1. An address is aligned, and the whole tensor lies within one live allocation.
2. No output overlaps another tensor of the run, but a KV output is at its input's address, the engine's aliases.
3. Every byte that a run or a copy reads was written before. Fresh memory is filled with 0xFF, which is NaN.
4. A KV update stays within the capacity, and no row of the cache below it was left out.
5. Within a capture nothing touches the host: no upload, download, allocation, loading or waiting; and a context must have
   run once before it is captured.
6. Uploads and downloads use page-locked memory of this device.

An engine file is the engine's ONNX graph in the standard dialect. Float32 and float16 only: ONNX Runtime's CPU kernels.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime import contract
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.ort_session import open_session
from dmtd_runtime.device.base import ALIGNMENT, Address, Array, Capture, EngineTensor, Mark
from dmtd_runtime.errors import BackendError

ORT_DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
}
Work = Callable[[], None]


class SeamError(AssertionError):
    """The backend broke a rule of the device; a bug, never the user's fault."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Block:
    """One allocation. ``written`` marks every byte that was written since."""

    what: str
    address: int
    data: Array
    written: Array
    rows: dict[int, Array] = field(default_factory=dict)  # KV caches: rows in use of each slot, by offset


class HostDevice:
    """See :class:`dmtd_runtime.device.base.Device`.

    Args:
        memory_bytes: what it claims to have.
        threads: of ONNX Runtime.
    """

    def __init__(self, *, memory_bytes: int = 1 << 34, threads: int = 1) -> None:
        self.name = "host device"
        self.captures = 0
        self.replays = 0
        self._total = memory_bytes
        self._threads = threads
        self._blocks: dict[int, _Block] = {}
        self._pinned: list[Array] = []
        self._stream: deque[Work] = deque()
        self._done = 0
        self._recording: list[Work] | None = None
        self._captured: dict[int, list[Work]] = {}
        self._numbers = itertools.count(1)

    def memory(self) -> tuple[int, int]:
        return self._total - sum(block.data.nbytes for block in self._blocks.values()), self._total

    def alloc(self, num_bytes: int, what: str) -> Address:
        self._forbid_in_capture(f"allocating {what}")
        if num_bytes > self.memory()[0]:
            raise BackendError(f"{self.name}: out of memory for {what}, {num_bytes} bytes")
        raw = np.full(max(num_bytes, 1) + ALIGNMENT, 0xFF, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        data = raw[start : start + max(num_bytes, 1)]
        block = _Block(what=what, address=data.ctypes.data, data=data, written=np.zeros(len(data), np.bool_))
        self._blocks[block.address] = block
        return Address(block.address)

    def free(self, address: Address) -> None:
        if self._blocks.pop(address, None) is None:
            raise SeamError(f"free: {address:#x} is no allocation")

    def alloc_host(self, num_bytes: int) -> Array:
        self._forbid_in_capture("allocating host memory")
        self._pinned.append(np.zeros(num_bytes, np.uint8))
        return self._pinned[-1]

    def zero(self, address: Address, num_bytes: int) -> None:
        self._span(address, num_bytes, "zero")

        def work() -> None:
            block, span = self._span(address, num_bytes, "zero")
            block.data[span], block.written[span] = 0, True
            block.rows.clear()

        self._push(work)

    def upload(self, target: Address, source: Array) -> None:
        self._check_pinned(source, "upload")
        self._span(target, source.nbytes, "upload")

        def work() -> None:
            block, span = self._span(target, source.nbytes, "upload")
            block.data[span], block.written[span] = source.reshape(-1).view(np.uint8), True

        self._push(work, touches_host="an upload")

    def download(self, target: Array, source: Address) -> None:
        self._check_pinned(target, "download")
        self._span(source, target.nbytes, "download")

        def work() -> None:
            target.reshape(-1).view(np.uint8)[:] = self._read(source, target.nbytes, "download")

        self._push(work, touches_host="a download")

    def copy(
        self,
        target: Address,
        source: Address,
        *,
        row_bytes: int,
        rows: int = 1,
        target_pitch: int = 0,
        source_pitch: int = 0,
    ) -> None:
        if rows > 1 and min(target_pitch, source_pitch) < row_bytes:
            raise SeamError(f"copy: pitches {target_pitch}, {source_pitch} below the row's {row_bytes} bytes")

        def work() -> None:
            for row in range(rows):
                data = self._read(source + row * source_pitch, row_bytes, "copy")
                block, span = self._span(target + row * target_pitch, row_bytes, "copy")
                block.data[span], block.written[span] = data, True
                block.rows.clear()  # a moved cache is judged by its bytes alone

        self._push(work)

    def load_engine(self, path: Path) -> HostEngine:
        self._forbid_in_capture("loading an engine")
        return HostEngine(self, path, self._threads)

    def begin_capture(self) -> None:
        self._forbid_in_capture("a second capture")
        self._recording = []

    def end_capture(self) -> Capture:
        if self._recording is None:
            raise SeamError("end_capture: nothing is being captured")
        capture = Capture(next(self._numbers))
        self._captured[capture], self._recording = self._recording, None
        self.captures += 1
        return capture

    def replay(self, capture: Capture) -> None:
        self._forbid_in_capture("a replay")
        self._stream.extend(self._captured[capture])
        self.replays += 1

    def mark(self) -> Mark:
        self._forbid_in_capture("a mark")
        return Mark(self._done + len(self._stream))

    def wait(self, mark: Mark) -> None:
        self._forbid_in_capture("waiting")
        while self._done < mark:
            work = self._stream.popleft()
            self._done += 1
            work()

    def close(self) -> None:
        for owned in (self._blocks, self._pinned, self._stream, self._captured):
            owned.clear()

    def push(self, work: Work) -> None:
        """Enqueue work of an engine's context."""
        self._push(work)

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    def tensor(self, address: int, num_bytes: int, what: str) -> tuple[_Block, slice]:
        """The allocation and bytes of a tensor. SeamError for a wrong address (rule 1)."""
        if address % ALIGNMENT:
            raise SeamError(f"{what}: address {address:#x} is not a multiple of {ALIGNMENT}")
        return self._span(address, num_bytes, what)

    def require_written(self, block: _Block, span: slice, what: str) -> None:
        """SeamError for bytes that nothing has written (rule 3)."""
        if not block.written[span].all():
            first = int(np.argmin(block.written[span]))
            raise SeamError(f"{what}: byte {span.start + first} of {block.what} is read before anything has written it")

    def _span(self, address: int, num_bytes: int, what: str) -> tuple[_Block, slice]:
        for block in self._blocks.values():
            start = address - block.address
            if 0 <= start < len(block.data):
                if start + num_bytes > len(block.data):
                    raise SeamError(
                        f"{what}: {num_bytes} bytes from {start} pass the end of {block.what}, {len(block.data)}"
                    )
                return block, slice(start, start + num_bytes)
        raise SeamError(f"{what}: address {address:#x} lies in no allocation")

    def _read(self, address: int, num_bytes: int, what: str) -> Array:
        block, span = self._span(address, num_bytes, what)
        self.require_written(block, span, what)
        data: Array = block.data[span]
        return data

    def _check_pinned(self, array: Array, what: str) -> None:
        start, end = array.ctypes.data, array.ctypes.data + array.nbytes
        if not array.flags.c_contiguous or not any(
            own.ctypes.data <= start and end <= own.ctypes.data + own.nbytes for own in self._pinned
        ):
            raise SeamError(f"{what}: the host array is not page-locked memory of this device, or not contiguous")

    def _push(self, work: Work, *, touches_host: str = "") -> None:
        if touches_host:
            self._forbid_in_capture(touches_host)
        (self._stream if self._recording is None else self._recording).append(work)

    def _forbid_in_capture(self, what: str) -> None:
        if self._recording is not None:
            raise SeamError(f"{what} within a capture: a graph holds device work alone")


class HostEngine:
    """An engine graph in ONNX Runtime. See :class:`dmtd_runtime.device.base.Engine`."""

    scratch_bytes = 4 * ALIGNMENT

    def __init__(self, device: HostDevice, path: Path, threads: int) -> None:
        self.device = device
        self.session = open_session(path, BackendOptions(threads=threads))
        infos = [(info, True) for info in self.session.get_inputs()] + [(i, False) for i in self.session.get_outputs()]
        self.tensors: dict[str, EngineTensor] = {}
        for info, is_input in infos:
            cache = contract.cache_name(info.name)
            self.tensors[info.name] = EngineTensor(
                name=info.name,
                dims=tuple(dim if isinstance(dim, int) else -1 for dim in info.shape),
                dtype=ORT_DTYPES[info.type].name,
                is_input=is_input,
                alias=contract.past(cache.layer, cache.kind) if cache and not is_input else None,
            )

    def context(
        self, profile: int, shapes: Mapping[str, Sequence[int]], scratch: Address, scratch_bytes: int
    ) -> HostContext:
        if scratch_bytes < self.scratch_bytes:
            raise SeamError(f"scratch: got {scratch_bytes} bytes, expected {self.scratch_bytes}")
        self.device.tensor(scratch, scratch_bytes, "scratch")
        return HostContext(self, {name: tuple(shape) for name, shape in shapes.items()})


class HostContext:
    """See :class:`dmtd_runtime.device.base.EngineContext`."""

    def __init__(self, engine: HostEngine, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._engine, self._device = engine, engine.device
        self._shapes = dict(shapes)
        self._addresses: dict[str, int] = {}
        self._has_run = False
        self._bound: dict[tuple[int, ...], Any] = {}
        for name, tensor in engine.tensors.items():
            if tensor.is_input and not _fits(self._shapes.get(name), tensor.dims):
                raise SeamError(f"{name}: got shape {self._shapes.get(name)}, expected {tensor.dims}")
        sizes = self._sizes()
        for info in engine.session.get_outputs():
            self._shapes[info.name] = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in info.shape)

    def set_address(self, name: str, address: Address) -> None:
        if name not in self._engine.tensors:
            raise SeamError(f"{name}: the engine has no such input or output")
        self._addresses[name] = address

    def enqueue(self) -> None:
        if self._device.capturing and not self._has_run:
            raise SeamError("a context is captured that has not run before: warm it up first")
        missing = [name for name in self._engine.tensors if name not in self._addresses]
        if missing:
            raise SeamError(f"{missing[0]}: no address was set")
        addresses = dict(self._addresses)  # what a later set_address changes is not this run's
        self._check_overlaps(addresses)
        self._has_run |= not self._device.capturing
        self._device.push(lambda: self._run(addresses))

    def _run(self, addresses: Mapping[str, int]) -> None:
        tensors = self._engine.tensors
        spans = {name: self._device.tensor(addresses[name], self._num_bytes(name), name) for name in tensors}
        for name, tensor in tensors.items():
            if tensor.is_input:
                self._device.require_written(*spans[name], name)
        self._check_updates(spans)
        self._session_run(addresses)
        for name, tensor in tensors.items():
            if not tensor.is_input:
                block, span = spans[name]
                block.written[span] = True

    def _session_run(self, addresses: Mapping[str, int]) -> None:
        key = tuple(addresses.values())
        if key not in self._bound:
            binding = self._bound[key] = self._engine.session.io_binding()
            for name, tensor in self._engine.tensors.items():
                bind = binding.bind_input if tensor.is_input else binding.bind_output
                bind(name, "cpu", 0, np.dtype(tensor.dtype), self._shapes[name], addresses[name])
        try:
            self._engine.session.run_with_iobinding(self._bound[key])
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {str(error).strip().splitlines()[0][:300]}") from error

    def _check_overlaps(self, addresses: Mapping[str, int]) -> None:
        """Rule 2, and rule 1 as far as it can be seen before the run."""
        spans = sorted((address, address + self._num_bytes(name), name) for name, address in addresses.items())
        for name, tensor in self._engine.tensors.items():
            self._device.tensor(addresses[name], self._num_bytes(name), name)
            if tensor.alias is not None and addresses[name] != addresses[tensor.alias]:
                raise SeamError(f"{name}: must lie at the address of {tensor.alias}, which it updates in place")
        for (_, end, first), (start, _, second) in itertools.pairwise(spans):
            one, other = self._engine.tensors[first], self._engine.tensors[second]
            both_read = one.is_input and other.is_input
            if start < end and not both_read and first not in (other.alias,) and second not in (one.alias,):
                raise SeamError(f"{second}: overlaps {first}")

    def _check_updates(self, spans: Mapping[str, tuple[_Block, slice]]) -> None:
        """Rule 4: what TensorRT ignores silently, and rows that would be seen but were never written."""
        for name in self._shapes:
            cache = contract.cache_name(name)
            if cache is None or not self._engine.tensors[name].is_input:
                continue
            block, span = spans[name]
            batch, _, capacity, _ = self._shapes[name]
            group, rows = self._update_rows(cache.layer, name)
            first_rows = self._numbers(contract.write_indices(group), spans)
            in_use = block.rows.setdefault(span.start, np.zeros(0, np.int64))
            if len(in_use) < batch:
                in_use = np.concatenate([in_use, np.full(batch - len(in_use), capacity)])
            for slot, first in enumerate(first_rows.tolist()):
                if first < 0 or first + rows > capacity:
                    raise SeamError(f"{name}: slot {slot} writes rows {first} to {first + rows - 1} of {capacity}")
                if first > in_use[slot]:
                    raise SeamError(
                        f"{name}: slot {slot} writes from row {first}, rows from {in_use[slot]} are not written"
                    )
                in_use[slot] = first + rows
            block.rows[span.start] = in_use

    def _update_rows(self, layer: int, name: str) -> tuple[contract.Group, int]:
        """The group that updates a layer's cache in this graph, and how many rows a run writes."""
        inputs = self._engine.tensors
        both = contract.write_indices("late") in inputs and contract.write_indices("thinking") in inputs
        if both:  # full_pass: D's layers are the last ones of the stack
            raise SeamError(f"{name}: the host device judges staged engines only")
        if contract.write_indices("late") in inputs:
            return "late", self._shapes[contract.GATE_HIDDEN][1]
        return "thinking", self._shapes[contract.INPUT_IDS][1]

    def _numbers(self, name: str, spans: Mapping[str, tuple[_Block, slice]]) -> Array:
        block, span = spans[name]
        numbers: Array = block.data[span].view(self._engine.tensors[name].dtype)
        return numbers

    def _num_bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * np.dtype(self._engine.tensors[name].dtype).itemsize

    def _sizes(self) -> dict[str, int]:
        """Symbolic dimensions by name. SeamError where two inputs disagree."""
        sizes: dict[str, int] = {}
        for info in self._engine.session.get_inputs():
            for dim, size in zip(info.shape, self._shapes[info.name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise SeamError(f"{info.name}: {dim} is {size}, another input has {sizes[dim]}")
        return sizes


def _fits(shape: tuple[int, ...] | None, dims: tuple[int, ...]) -> bool:
    return (
        shape is not None
        and len(shape) == len(dims)
        and all(dim in (-1, size) and size > 0 for size, dim in zip(shape, dims, strict=True))
    )
