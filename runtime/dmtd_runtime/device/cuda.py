"""A GPU: memory, one stream and CUDA graphs through cuda-bindings, engines through TensorRT or TensorRT-RTX. No torch.

Rules it follows: one non-blocking stream for everything; host memory is page-locked, so that copies are asynchronous; one
execution context for each engine and set of shapes (a captured graph keeps using its context's state, so a context's shapes
never change after the first run); contexts get their activation memory from outside, one buffer for all, because they run
one after another; a graph is captured after every context in it has run once. What is wrong is found by whoever calls next,
as CUDA reports errors of asynchronous work late.

Never executed on a GPU so far; ``host.py`` is the same seam with numbers.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime.device.base import Address, Array, Capture, Engine, EngineTensor, Mark
from dmtd_runtime.device.kernel_cache import KernelCache
from dmtd_runtime.device.libraries import CudaFlavour, GpuFacts, import_cuda, import_flavour, look_at_gpu
from dmtd_runtime.device.library_log import make_log
from dmtd_runtime.errors import BackendError

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
REBUILD = "build the engines again with: dmtd build BUNDLE --force"


class CudaDevice:
    """See :class:`dmtd_runtime.device.base.Device`.

    Args:
        flavour: whose engines it runs; None takes what is installed.
        device_id: which GPU.

    Raises:
        BackendError: a library, the driver or the GPU is missing or unfit.
    """

    def __init__(self, *, flavour: CudaFlavour | None = None, device_id: int = 0) -> None:
        self.flavour, self._trt = import_flavour(flavour)
        self.library_version = str(self._trt.__version__)
        self._cuda = import_cuda()
        self.gpu: GpuFacts = look_at_gpu(self._cuda, device_id)
        self.name = f"GPU {device_id} ({self.gpu.name})"
        self._thread, self._closed = -1, False
        self._stream = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self.capturing = False
        self._blocks, self._host_blocks = list[int](), list[int]()
        self._numbers = itertools.count(1)
        self._events, self._spare_events, self._passed = dict[int, Any](), list[Any](), 0
        self._graphs: dict[int, Any] = {}
        self._log = make_log(self._trt)
        try:
            self._runtime = self._trt.Runtime(self._log)
        except (TypeError, RuntimeError):  # pybind's words for a null pointer
            self.call("cudaStreamDestroy", self._stream)
            raise BackendError(
                f"{self.flavour} cannot start on {self.name}: {self._log.take()}; see `dmtd doctor`"
            ) from None
        self._engines: list[CudaEngine] = []

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

    def load_engine(self, path: Path) -> Engine:
        data = np.memmap(path, np.uint8, "r")  # pages of the file, no copy in anonymous memory
        self._log.take()
        self.call("cudaGetDevice")  # the thread's current device is the one that the engine goes to
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(f"{path} cannot be loaded on {self.name}: {self._log.take()}; {REBUILD}")
        loaded = CudaEngine(self, self._trt, engine, path, self._log)
        self._engines.append(loaded)
        return loaded

    def capture(self, work: Callable[[], None]) -> Capture:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self._stream, mode)
        self.capturing = True
        try:
            work()
        except BaseException:
            # The stream must leave the capture; the error of the work is the one to tell.
            error, graph = self._cuda.cudaStreamEndCapture(self._stream)
            if error == self._cuda.cudaError_t.cudaSuccess:
                self._cuda.cudaGraphDestroy(graph)
            raise
        finally:
            self.capturing = False
        graph = self.call("cudaStreamEndCapture", self._stream)
        try:
            executable = self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)
        capture = Capture(next(self._numbers))
        self._graphs[capture] = executable
        self.call("cudaGraphUpload", executable, self._stream)
        return capture

    def replay(self, capture: Capture) -> None:
        self.call("cudaGraphLaunch", self._graphs[capture], self._stream)

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
        if self._closed:
            return
        self._closed = True
        cuda = self._cuda
        # Nothing is raised here: an error of the work before it would come again from every call.
        cuda.cudaSetDevice(self.gpu.device_id)
        cuda.cudaStreamSynchronize(self._stream)
        for executable in self._graphs.values():
            cuda.cudaGraphExecDestroy(executable)
        for engine in self._engines:  # their weights go now, not when somebody collects garbage
            engine.release()
        self._runtime = None
        for event in (*self._events.values(), *self._spare_events):
            cuda.cudaEventDestroy(event)
        for address in self._blocks:
            cuda.cudaFree(address)
        for address in self._host_blocks:
            cuda.cudaFreeHost(address)
        cuda.cudaStreamDestroy(self._stream)

    def _copy(self, target: int, source: int, num_bytes: int, kind: str) -> None:
        if num_bytes:
            kind_value = getattr(self._cuda.cudaMemcpyKind, kind)
            self.call("cudaMemcpyAsync", target, source, num_bytes, kind_value, self._stream)

    def _raise_for(self, what: str, error: Any) -> None:
        if error == self._cuda.cudaError_t.cudaSuccess:
            return
        name, text = (get(error)[1].decode() for get in (self._cuda.cudaGetErrorName, self._cuda.cudaGetErrorString))
        raise BackendError(f"{self.name}: {what} failed: {name}, {text}")


class CudaEngine:
    """A deserialised engine. See :class:`dmtd_runtime.device.base.Engine`."""

    def __init__(self, device: CudaDevice, trt: Any, engine: Any, path: Path, log: Any) -> None:
        self.device, self.file, self.log = device, path.name, log
        self._trt, self._engine = trt, engine
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self._contexts: list[CudaContext] = []
        self._kernels: KernelCache | None = None
        self._config = self._make_config(path) if device.flavour == "tensorrt-rtx" else None
        self.tensors: dict[str, EngineTensor] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise BackendError(f"{self.file}, {name}: lies on the host, expected the device; {REBUILD}")
            self.tensors[name] = EngineTensor(
                name=name,
                dims=tuple(engine.get_tensor_shape(name)),
                dtype=DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name),
                is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                alias=engine.get_aliased_input_tensor(name) or None,
            )

    def context(
        self, profile: int, shapes: Mapping[str, Sequence[int]], scratch: Address, scratch_bytes: int
    ) -> CudaContext:
        context = self._create()
        if context is None:
            raise BackendError(f"{self.file}: no execution context: {self.log.take()}")
        if not context.set_optimization_profile_async(profile, self.device.stream):
            raise BackendError(f"{self.file}: no profile {profile}: {self.log.take()}; {REBUILD}")
        self.device.wait(self.device.mark())
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, profile)
                raise BackendError(
                    f"{self.file}, {name}: got {list(shape)}, profile {profile} takes {list(low)} to {list(high)}; {REBUILD}"
                )
        context.set_device_memory(scratch, scratch_bytes)
        self._contexts.append(CudaContext(self, context, checks_capture=self._config is not None))
        return self._contexts[-1]

    def release(self) -> None:
        """Save what was compiled since it was loaded, and free contexts and weights, in this order; nothing runs any more."""
        if self._kernels is not None:
            self._kernels.save()
        for context in self._contexts:
            context.release()
        self._contexts.clear()
        self._kernels = self._config = self._engine = None

    def _make_config(self, path: Path) -> Any:
        """How TensorRT-RTX runs the engine; it compiles kernels when contexts are made."""
        trt, config = self._trt, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Kernels for the shapes at once, not later on a thread of its own: a captured graph would keep the slower ones.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # whole cycles are captured here instead
        cache = config.create_runtime_cache()
        self._kernels = KernelCache(cache, path, f"{self.device.gpu.name} {self.device.library_version}")
        config.set_runtime_cache(cache)
        return config

    def _create(self) -> Any:
        if self._config is not None:
            return self._engine.create_execution_context(self._config)
        return self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)


class CudaContext:
    """An execution context. See :class:`dmtd_runtime.device.base.EngineContext`."""

    def __init__(self, engine: CudaEngine, context: Any, *, checks_capture: bool) -> None:
        self._engine, self._context, self._checks_capture = engine, context, checks_capture

    def release(self) -> None:
        self._context = None

    def set_address(self, name: str, address: Address) -> None:
        if not self._context.set_tensor_address(name, address):
            raise BackendError(f"{self._engine.file}, {name}: address refused: {self._engine.log.take()}")

    def enqueue(self) -> None:
        device = self._engine.device
        if self._checks_capture and device.capturing and not self._context.is_stream_capturable(device.stream):
            raise BackendError(f"{self._engine.file} cannot be captured into a CUDA graph")
        if not self._context.execute_async_v3(device.stream):
            raise BackendError(f"{self._engine.file}: the run was refused: {self._engine.log.take()}")
