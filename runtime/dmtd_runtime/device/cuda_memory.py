"""A GPU's memory and one stream through cuda-bindings: what ONNX Runtime's CUDA backend and the engine backend share. No torch.

One non-blocking stream for everything; host memory is page-locked, so that copies are asynchronous. What is wrong is found
by whoever calls next, as CUDA reports errors of asynchronous work late.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from typing import Any

import numpy as np

from dmtd_runtime.device.base import Address, Array, Mark
from dmtd_runtime.device.libraries import GpuFacts, import_cuda, look_at_gpu
from dmtd_runtime.errors import BackendError


class CudaMemory:
    """The part of :class:`dmtd_runtime.device.base.Device` that needs no TensorRT.

    Args:
        device_id: which GPU.

    Raises:
        BackendError: cuda-bindings, the driver or the GPU is missing or unfit.
    """

    def __init__(self, device_id: int = 0) -> None:
        self._cuda = import_cuda()
        self.gpu: GpuFacts = look_at_gpu(self._cuda, device_id)
        self.name = f"GPU {device_id} ({self.gpu.name})"
        self._thread, self._closed = -1, False
        self._stream = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self._blocks, self._host_blocks = list[int](), list[int]()
        self._numbers = itertools.count(1)
        self._events, self._spare_events, self._passed = dict[int, Any](), list[Any](), 0

    def call(self, name: str, *args: Any) -> Any:
        """A function of the CUDA runtime; its result without the error code, which is raised as BackendError."""
        if threading.get_ident() != self._thread:  # the current device belongs to the thread
            self._thread = threading.get_ident()
            self._raise_for("cudaSetDevice", self._cuda.cudaSetDevice(self.gpu.device_id)[0])
        error, *results = getattr(self._cuda, name)(*args)
        self._raise_for(name, error)
        return results[0] if len(results) == 1 else results

    def memory(self) -> tuple[int, int]:
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def alloc(self, num_bytes: int, what: str) -> Address:
        try:
            address = int(self.call("cudaMalloc", max(num_bytes, 1)))  # aligned to 256 bytes at least
        except BackendError as error:
            raise BackendError(f"{self.name}: no memory for {what}, {num_bytes / 1e9:.2f} GB: {error}") from None
        self._blocks.append(address)
        return Address(address)

    def alloc_host(self, num_bytes: int) -> Array:
        size = max(num_bytes, 1)
        address = int(self.call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))
        self._host_blocks.append(address)
        array: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))[:num_bytes]
        array[:] = 0
        return array

    def zero(self, address: Address, num_bytes: int) -> None:
        self.call("cudaMemsetAsync", address, 0, num_bytes, self._stream)

    def upload(self, target: Address, source: Array) -> None:
        self._copy(target, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, target: Array, source: Address) -> None:
        self._copy(target.ctypes.data, source, target.nbytes, "cudaMemcpyDeviceToHost")

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
        if not row_bytes or not rows:
            return
        if rows == 1:
            self._copy(target, source, row_bytes, "cudaMemcpyDeviceToDevice")
            return
        kind, stream = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, self._stream
        self.call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, row_bytes, rows, kind, stream)

    def mark(self) -> Mark:
        flags, spare = self._cuda.cudaEventDisableTiming, self._spare_events
        event = spare.pop() if spare else self.call("cudaEventCreateWithFlags", flags)
        self.call("cudaEventRecord", event, self._stream)
        mark = Mark(next(self._numbers))
        self._events[mark] = event
        return mark

    def wait(self, mark: Mark) -> None:
        if mark <= self._passed:
            return
        self.call("cudaEventSynchronize", self._events[mark])
        self._passed = mark
        for earlier in [number for number in self._events if number <= mark]:
            self._spare_events.append(self._events.pop(earlier))

    def close(self) -> None:
        """Free everything. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        cuda = self._cuda
        # Nothing is raised here: an error of the work before it would come again from every call.
        cuda.cudaSetDevice(self.gpu.device_id)
        cuda.cudaStreamSynchronize(self._stream)
        self._release()
        for event in (*self._events.values(), *self._spare_events):
            cuda.cudaEventDestroy(event)
        for address in self._blocks:
            cuda.cudaFree(address)
        for address in self._host_blocks:
            cuda.cudaFreeHost(address)
        cuda.cudaStreamDestroy(self._stream)

    def _release(self) -> None:
        """Free what uses the memory, before it goes."""

    def _copy(self, target: int, source: int, num_bytes: int, kind: str) -> None:
        if num_bytes:
            kind_value = getattr(self._cuda.cudaMemcpyKind, kind)
            self.call("cudaMemcpyAsync", target, source, num_bytes, kind_value, self._stream)

    def _raise_for(self, what: str, error: Any) -> None:
        if error == self._cuda.cudaError_t.cudaSuccess:
            return
        name, text = (get(error)[1].decode() for get in (self._cuda.cudaGetErrorName, self._cuda.cudaGetErrorString))
        raise BackendError(f"{self.name}: {what} failed: {name}, {text}")
