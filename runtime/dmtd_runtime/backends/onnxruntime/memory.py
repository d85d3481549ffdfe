"""Where the tensors of an ONNX Runtime backend lie: in host memory, or on a GPU with one stream for all sessions.

Graphs are bound by address. Large tensors (caches, thought, logits) are :class:`Buffer`; the small ones that change in every
run stand together in a :class:`Block`. On the host both are plain arrays. On a GPU a block is one piece of device memory and
one of page-locked host memory, so that one asynchronous copy moves all of it, and nothing waits but :meth:`OrtMemory.read`,
:meth:`Block.pull` and :meth:`OrtMemory.wait`: once a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.layouts.blocks import BlockLayout
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import DTYPE_BYTES, GraphInfo
from dmtd_runtime.device.base import Address, Array
from dmtd_runtime.device.cuda_memory import CudaMemory
from dmtd_runtime.errors import BundleError
from dmtd_runtime.ort.cuda_provider import prepare
from dmtd_runtime.ort.library import import_onnxruntime

Arrays = Iterable[tuple[str, Sequence[int], str]]  # (name, shape, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Memory that graphs are bound to by address. ``array`` is the host's view of it, None on a GPU."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    array: Array | None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def rows(self, first: int, count: int) -> Buffer:
        """``count`` entries of the first axis, from ``first`` on."""
        stride = math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]
        return replace(
            self,
            address=self.address + first * stride,
            shape=(count, *self.shape[1:]),
            array=None if self.array is None else self.array[first : first + count],
        )

    def prefix(self, shape: Sequence[int]) -> Buffer:
        """The first entries under another shape."""
        count = math.prod(shape)
        assert count <= math.prod(self.shape), f"{list(shape)} does not fit into {list(self.shape)}"
        array = None if self.array is None else self.array.reshape(-1)[:count].reshape(shape)
        return replace(self, shape=tuple(shape), array=array)


class Block:
    """Small tensors by name, in host memory: everything is bound where it is, so there is nothing to do."""

    def __init__(self, arrays: Mapping[str, Array], addresses: Mapping[str, int]) -> None:
        self.arrays, self.addresses = arrays, addresses

    def begin(self) -> None:
        """Before the arrays are filled: none may be left as another block of the name had it."""

    def push(self) -> None:
        """Take what stands in the arrays to the device, behind everything enqueued before."""

    def pull(self) -> None:
        """Wait, and bring what stands on the device back into the arrays."""


class GpuBlock(Block):
    """The same on a GPU, over memory that all blocks of one name share."""

    def __init__(self, cuda: CudaMemory, layout: BlockLayout, address: Address, pinned: Array) -> None:
        super().__init__(layout.views(pinned), {name: layout.address(address, name) for name in layout.regions})
        self._cuda, self._address, self._pinned = cuda, address, pinned[: layout.num_bytes]

    def begin(self) -> None:
        self._pinned[:] = 0

    def push(self) -> None:
        self._cuda.upload(self._address, self._pinned)

    def pull(self) -> None:
        self._cuda.download(self._pinned, self._address)
        self._cuda.wait(self._cuda.mark())


class OrtMemory(Protocol):
    """What a backend allocates from. ``device`` is its name as ONNX Runtime binds it; ``stream`` None on the host."""

    @property
    def device(self) -> tuple[str, int]: ...

    @property
    def stream(self) -> int | None: ...

    def reserve(self, name: str, arrays: Arrays) -> None:
        """Make room for every block of this name, ``arrays`` being the largest: one is in use at a time."""
        ...

    def block(self, name: str, arrays: Arrays) -> Block:
        """A block, zeroed where it is on the host."""
        ...

    def zeros(self, shape: Sequence[int], dtype: str, what: str) -> Buffer:
        """A zeroed buffer; ``what`` names it in errors."""
        ...

    def clear(self, buffer: Buffer) -> None:
        """Zero a buffer, behind everything enqueued before."""
        ...

    def move_rows(self, cache: Buffer, source: int, target: int, rows: int) -> None:
        """Copy the first rows of a slot over another's; ``cache`` is [slots, kv_heads, capacity, head_dim]."""
        ...

    def read(self, buffer: Buffer) -> Array:
        """The buffer's content once everything enqueued before has run; valid until the next call."""
        ...

    def wait(self) -> None:
        """Wait for everything enqueued before."""
        ...

    def close(self) -> None:
        """Free everything. Nothing may be bound to it any more."""
        ...


class HostMemory:
    """See :class:`OrtMemory`. Everything is bound where it is, so nothing is ever copied."""

    device = ("cpu", 0)
    stream: int | None = None

    def reserve(self, name: str, arrays: Arrays) -> None: ...

    def block(self, name: str, arrays: Arrays) -> Block:
        made = {entry: np.zeros(shape, dtype) for entry, shape, dtype in arrays}
        return Block(made, {entry: array.ctypes.data for entry, array in made.items()})

    def zeros(self, shape: Sequence[int], dtype: str, what: str) -> Buffer:
        return host_buffer(np.zeros(shape, dtype))

    def clear(self, buffer: Buffer) -> None:
        assert buffer.array is not None, "a host's buffer has an array"
        buffer.array[:] = 0

    def move_rows(self, cache: Buffer, source: int, target: int, rows: int) -> None:
        assert cache.array is not None, "a host's buffer has an array"
        cache.array[target, :, :rows] = cache.array[source, :, :rows]

    def read(self, buffer: Buffer) -> Array:
        assert buffer.array is not None, "a host's buffer has an array"
        return buffer.array

    def wait(self) -> None: ...

    def close(self) -> None: ...


class GpuMemory:
    """See :class:`OrtMemory`. ``cuda`` is the device; all sessions are to run on its stream."""

    def __init__(self, cuda: CudaMemory) -> None:
        self.cuda = cuda
        self.device = ("cuda", cuda.gpu.device_id)
        self.stream: int | None = cuda.stream
        self._reserved: dict[str, tuple[Address, Array]] = {}
        self._landing: Array = np.zeros(0, np.uint8)

    def reserve(self, name: str, arrays: Arrays) -> None:
        num_bytes = BlockLayout.of(arrays).num_bytes
        assert name not in self._reserved, f"{name} has its room already"
        address = self.cuda.alloc(num_bytes, f"inputs of {name}")
        self.cuda.zero(address, num_bytes)  # a block is copied whole, gaps between its arrays too
        self._reserved[name] = address, self.cuda.alloc_host(num_bytes)

    def block(self, name: str, arrays: Arrays) -> Block:
        layout = BlockLayout.of(arrays)
        address, pinned = self._reserved[name]
        assert layout.num_bytes <= len(pinned), f"{name}: {layout.num_bytes} bytes, {len(pinned)} are reserved"
        return GpuBlock(self.cuda, layout, address, pinned)

    def zeros(self, shape: Sequence[int], dtype: str, what: str) -> Buffer:
        num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        address = self.cuda.alloc(num_bytes, what)
        self.cuda.zero(address, num_bytes)
        return Buffer(address=address, shape=tuple(shape), dtype=dtype, array=None)

    def clear(self, buffer: Buffer) -> None:
        self.cuda.zero(Address(buffer.address), buffer.num_bytes)

    def move_rows(self, cache: Buffer, source: int, target: int, rows: int) -> None:
        _, heads, capacity, width = cache.shape
        row_bytes = width * DTYPE_BYTES[cache.dtype]
        pitch = capacity * row_bytes
        self.cuda.copy(
            Address(cache.address + target * heads * pitch),
            Address(cache.address + source * heads * pitch),
            row_bytes=rows * row_bytes,
            rows=heads,
            target_pitch=pitch,
            source_pitch=pitch,
        )

    def read(self, buffer: Buffer) -> Array:
        if len(self._landing) < buffer.num_bytes:
            self._landing = self.cuda.alloc_host(buffer.num_bytes)
        landing = self._landing[: buffer.num_bytes]
        self.cuda.download(landing, Address(buffer.address))
        self.wait()
        array: Array = landing.view(buffer.dtype).reshape(buffer.shape)
        return array

    def wait(self) -> None:
        self.cuda.wait(self.cuda.mark())

    def close(self) -> None:
        self.cuda.close()


def open_memory(options: BackendOptions) -> OrtMemory:
    """The memory of the device that ``options`` name. BackendError where it is missing or unfit."""
    if options.device == "cpu":
        return HostMemory()
    prepare(import_onnxruntime(), options.device_id)
    return GpuMemory(CudaMemory(options.device_id))


def small_tensors(graph: GraphInfo, sizes: Mapping[str, int]) -> list[tuple[str, list[int], str]]:
    """(name, shape, dtype) of the inputs and outputs of a graph that stand in its block."""
    small = [
        info
        for info in (*graph.inputs, *graph.outputs)
        if not contract.cache_name(info.name) and info.name not in (contract.THOUGHT, contract.LOGITS)
    ]
    if unknown := {dim for info in small for dim in info.dims if isinstance(dim, str)} - sizes.keys():
        raise BundleError(f"{graph.file}: the manifest names a dimension {min(unknown)!r}; export the bundle again")
    return [
        (info.name, [sizes[dim] if isinstance(dim, str) else dim for dim in info.dims], info.dtype) for info in small
    ]


def host_buffer(array: Array) -> Buffer:
    """A buffer over a numpy array, which must be contiguous."""
    assert array.flags.c_contiguous, "a bound array is contiguous"
    return Buffer(address=array.ctypes.data, shape=array.shape, dtype=array.dtype.name, array=array)
