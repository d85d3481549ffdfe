"""The simulator, a device in host memory: the engine graphs run in ONNX Runtime, with real numbers, behind the rules of a GPU.

It is what tests run the TensorRT backend on where there is no GPU. The stream is lazy: nothing runs before somebody waits,
so a missing wait reads old numbers and a buffer that is rewritten too early is uploaded as it then is. What a GPU or
TensorRT does silently wrong raises :class:`SeamError` here, when the call is made or when the work runs:

1. An address is aligned, and the whole tensor lies within one live allocation of this device, which is one stream.
2. No output overlaps another tensor of the run, and none the activations; but a KV output is at its input's address, the
   engine's aliases.
3. Every byte that a run or a copy reads was written before. Fresh memory is filled with 0xFF, which is NaN.
4. A KV update stays within the rows that the run sees, and no row of the cache below it was left out; T's caches may lag
   behind where padding stands, not where a sequence goes on.
5. Within a capture nothing touches the host: no upload, download, allocation, loading, context or waiting; and a context must
   have run once before it is captured.
6. Uploads and downloads use page-locked memory of this device.
7. Shapes lie within the profile that the record beside the engine names, and a context has all the activation memory it needs.

The first run of a context costs ``first_run_s`` of a time that only :attr:`SimulatedDevice.stalled_s` counts: what compiling
kernels costs on a GPU. Whoever times a run, or has warmed up, can look whether any of it fell there.

An engine file is the engine's ONNX graph in the standard dialect. Float32 and float16 only: ONNX Runtime's CPU kernels.
"""

from __future__ import annotations

import itertools
from bisect import bisect, insort
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmtd_runtime.device.base import ALIGNMENT, Address, Array, Capture, Engine, Mark
from dmtd_runtime.device.simulator.engine import SimulatedEngine
from dmtd_runtime.device.simulator.memory import Block, SeamError
from dmtd_runtime.errors import BackendError

__all__ = ["SeamError", "SimulatedDevice"]

Work = Callable[[], None]


class SimulatedDevice:
    """See :class:`dmtd_runtime.device.base.Device`.

    Args:
        memory_bytes: what it claims to have.
        threads: of ONNX Runtime.
        first_run_s: what the first run of a context costs.
    """

    def __init__(self, *, memory_bytes: int = 1 << 34, threads: int = 1, first_run_s: float = 1.0) -> None:
        self.name = "simulator"
        self.captures = 0
        self.replays = 0
        self.stalled_s = 0.0
        self._first_run_s = first_run_s
        self._total = memory_bytes
        self._threads = threads
        self._blocks: dict[int, Block] = {}
        self._starts: list[int] = []  # of the blocks, in order
        self._pinned: list[Array] = []
        self._stream: deque[Work] = deque()
        self._done = 0
        self._recording: list[Work] | None = None
        self._captured: dict[int, list[Work]] = {}
        self._numbers = itertools.count(1)

    def memory(self) -> tuple[int, int]:
        return self._total - sum(block.data.nbytes for block in self._blocks.values()), self._total

    def alloc(self, num_bytes: int, what: str) -> Address:
        self.forbid_in_capture(f"allocating {what}")
        if num_bytes > self.memory()[0]:
            raise BackendError(f"{self.name}: out of memory for {what}, {num_bytes} bytes")
        raw = np.full(max(num_bytes, 1) + ALIGNMENT, 0xFF, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        data = raw[start : start + max(num_bytes, 1)]
        block = Block(what=what, address=data.ctypes.data, data=data, written=np.zeros(len(data), np.bool_))
        self._blocks[block.address] = block
        insort(self._starts, block.address)
        return Address(block.address)

    def free(self, address: Address) -> None:
        """Give back an allocation: whatever in the stream still uses it breaks rule 1."""
        if self._blocks.pop(address, None) is None:
            raise SeamError(f"free: {address:#x} is no allocation")
        self._starts.remove(address)

    def alloc_host(self, num_bytes: int) -> Array:
        self.forbid_in_capture("allocating host memory")
        self._pinned.append(np.zeros(num_bytes, np.uint8))
        return self._pinned[-1]

    def zero(self, address: Address, num_bytes: int) -> None:
        self._span(address, num_bytes, "zero")

        def work() -> None:
            block, span = self._span(address, num_bytes, "zero")
            block.data[span], block.written[span] = 0, True
            block.rows.clear()
            block.gaps.clear()
            block.fresh = num_bytes == len(block.data)

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
                block.rows.clear()
                block.gaps.clear()
                block.fresh = False  # a moved cache is judged by its bytes alone

        self._push(work)

    def load_engine(self, path: Path) -> Engine:
        self.forbid_in_capture("loading an engine")
        return SimulatedEngine(self, path, self._threads)

    def capture(self, work: Callable[[], None]) -> Capture:
        self.forbid_in_capture("a second capture")
        recorded: list[Work] = []
        self._recording = recorded
        try:
            work()
        finally:
            self._recording = None
        capture = Capture(next(self._numbers))
        self._captured[capture] = recorded
        self.captures += 1
        return capture

    def replay(self, capture: Capture) -> None:
        self.forbid_in_capture("a replay")
        self._stream.extend(self._captured[capture])
        self.replays += 1

    def mark(self) -> Mark:
        self.forbid_in_capture("a mark")
        return Mark(self._done + len(self._stream))

    def wait(self, mark: Mark) -> None:
        self.forbid_in_capture("waiting")
        while self._done < mark:
            work = self._stream.popleft()
            self._done += 1
            work()

    def close(self) -> None:
        for owned in (self._blocks, self._starts, self._pinned, self._stream, self._captured):
            owned.clear()

    def push(self, work: Work) -> None:
        """Enqueue work of an engine's context."""
        self._push(work)

    def stall(self) -> None:
        """A context runs for the first time."""
        self.stalled_s += self._first_run_s

    def forbid_in_capture(self, what: str) -> None:
        """SeamError within a capture (rule 5)."""
        if self._recording is not None:
            raise SeamError(f"{what} within a capture: a graph holds device work alone")

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    def tensor(self, address: int, num_bytes: int, what: str) -> tuple[Block, slice]:
        """The allocation and bytes of a tensor. SeamError for a wrong address (rule 1)."""
        if address % ALIGNMENT:
            raise SeamError(f"{what}: address {address:#x} is not a multiple of {ALIGNMENT}")
        return self._span(address, num_bytes, what)

    def require_written(self, block: Block, span: slice, what: str) -> None:
        """SeamError for bytes that nothing has written (rule 3)."""
        if not block.written[span].all():
            first = int(np.argmin(block.written[span]))
            raise SeamError(f"{what}: byte {span.start + first} of {block.what} is read before anything has written it")

    def _span(self, address: int, num_bytes: int, what: str) -> tuple[Block, slice]:
        if index := bisect(self._starts, address):
            block = self._blocks[self._starts[index - 1]]
            start = address - block.address
            if start < len(block.data):
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
            self.forbid_in_capture(touches_host)
        (self._stream if self._recording is None else self._recording).append(work)
