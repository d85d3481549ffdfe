"""The seam between the engine backend and the device that runs its engines: memory, one stream, engines, captured graphs.

``cuda.py`` stands on cuda-bindings and TensorRT; ``simulator/`` runs the same engine graphs in ONNX Runtime on the CPU and
refuses what a GPU would do silently wrong. All work goes to one stream, in order, and is asynchronous: what a call reads
from host memory may be read, and what it writes there may be written, at any time until :meth:`Device.wait` returns.

Nothing here knows cycles, sequences or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NewType, Protocol

import numpy as np

from dmtd_runtime.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]
Address = NewType("Address", int)
Mark = NewType("Mark", int)  # a place in the stream
Capture = NewType("Capture", int)  # a captured graph
ALIGNMENT = 256  # of every address that an engine is given


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTensor:
    """One input or output of an engine as the engine itself tells it; -1 is a dimension that the shape decides."""

    name: str
    dims: tuple[int, ...]
    dtype: str
    is_input: bool
    alias: str | None = None  # the input whose address this output must have


class EngineContext(Protocol):
    """An engine at one set of input shapes. Its addresses may change from run to run, its shapes never."""

    def set_address(self, name: str, address: Address) -> None:
        """Bind an input or output. The address is read by every later :meth:`enqueue`."""
        ...

    def enqueue(self) -> None:
        """Run once, behind everything that was enqueued before. The first time it may compile kernels, and block."""
        ...

    def is_capturable(self) -> bool:
        """Whether it may run in a capture; to be asked before the capture begins."""
        ...


class Engine(Protocol):
    """A loaded engine: its weights are on the device."""

    @property
    def tensors(self) -> Mapping[str, EngineTensor]: ...

    @property
    def scratch_bytes(self) -> int:
        """Activation memory that a run needs."""
        ...

    def context(
        self, profile: int, shapes: Mapping[str, Sequence[int]], scratch: Address, scratch_bytes: int
    ) -> EngineContext:
        """A context for one profile and one set of input shapes.

        ``scratch`` may be shared by everything that runs on the same stream. BackendError where the profile does not take
        the shapes.
        """
        ...


class DeviceMemory(Protocol):
    """Memory on a device, and copies in its stream: the part of a :class:`Device` that knows no engines."""

    def alloc(self, num_bytes: int, what: str) -> Address:
        """Memory of undefined content, aligned to ``ALIGNMENT``, until the device is closed; ``what`` names it in errors."""
        ...

    def alloc_host(self, num_bytes: int) -> Array:
        """Page-locked host memory, uint8 [num_bytes], zeroed; the only host memory that uploads and downloads take."""
        ...

    def zero(self, address: Address, num_bytes: int) -> None: ...

    def upload(self, target: Address, source: Array) -> None: ...

    def download(self, target: Array, source: Address) -> None: ...

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
        """Copy ``rows`` rows within the device; pitches are the bytes from one row's start to the next one's."""
        ...

    def mark(self) -> Mark:
        """The place in the stream behind everything enqueued so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """Block until the stream has passed ``mark``. Errors of the work before it are raised here."""
        ...


class Device(DeviceMemory, Protocol):
    """One device with one stream. Not thread-safe."""

    name: str

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        ...

    def load_engine(self, path: Path) -> Engine:
        """BackendError with the reason and the fix where the file is not an engine for this device."""
        ...

    def capture(self, work: Callable[[], None]) -> Capture:
        """Record what ``work`` enqueues instead of running it. Anything else on the device within it is an error.

        BackendError where the device cannot record it; the stream is then as before.
        """
        ...

    def replay(self, capture: Capture) -> None:
        """Run what was recorded: the same work on the same addresses."""
        ...

    def close(self) -> None:
        """Free everything. Safe to call twice."""
        ...


def aligned(num_bytes: int) -> int:
    """``num_bytes`` rounded up to what an address behind it needs."""
    return -(-max(num_bytes, 1) // ALIGNMENT) * ALIGNMENT


class Room(Protocol):
    """What has so much memory: a :class:`Device`, or a part of one."""

    name: str

    def memory(self) -> tuple[int, int]: ...


def check_room(device: Room, needed: Mapping[str, int], hint: str) -> None:
    """Refuse before allocating what the device's free memory does not hold.

    Args:
        device: where it is to go.
        needed: bytes by what they are for, in the words of the message.
        hint: how the user needs less.

    Raises:
        BackendError: with every number.
    """
    free, total = device.memory()
    want = sum(aligned(count) for count in needed.values())
    if want <= free:
        return
    parts = ", ".join(f"{what} {count / 1e9:.2f} GB" for what, count in needed.items())
    raise BackendError(
        f"{device.name}: {want / 1e9:.2f} GB needed ({parts}), {free / 1e9:.2f} of {total / 1e9:.2f} GB free; {hint}"
    )
