"""Stand-ins for cuda-bindings' runtime module and TensorRT-RTX's that compute on the simulator.

They let every line of the CUDA device run, with numbers, where there is no GPU: calls go to ``SimulatedDevice``, which keeps its
rules, and they refuse what a driver or the library would take silently. Names, and numbers of arguments, are held against the
installed libraries by ``test_device_cuda.py``.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dmtd_runtime.bundle.engine_record import InputRange
from dmtd_runtime.device.base import Mark
from dmtd_runtime.device.simulator.device import SimulatedDevice
from dmtd_runtime.device.simulator.engine import SimulatedEngine
from dmtd_runtime.device.simulator.memory import SeamError

TRT_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


def install_fakes(patch: pytest.MonkeyPatch) -> FakeCuda:
    """Both modules, over one simulator, in the place of the real ones."""
    host = SimulatedDevice()
    cuda = FakeCuda(host)
    patch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(__version__="13.5.0"))  # type: ignore[arg-type]
    patch.setitem(sys.modules, "cuda.bindings.runtime", cuda)  # type: ignore[arg-type]
    patch.setitem(sys.modules, "tensorrt", None)  # type: ignore[arg-type]
    patch.setitem(sys.modules, "tensorrt_rtx", FakeRtx(host))  # type: ignore[arg-type]
    patch.setattr(FakeRtx, "capturable", True)
    patch.setattr(FakeRtx, "__version__", "1.7.1.116")
    return cuda


# Of each simulator: the stream that uses an activation memory.
SCRATCH_STREAMS: weakref.WeakKeyDictionary[SimulatedDevice, dict[int, int]] = weakref.WeakKeyDictionary()


class CudaError(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100


class Stream:
    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class FakeCuda:
    """``cuda.bindings.runtime`` over a simulator. ``calls`` are (name, number of arguments) of everything asked."""

    cudaError_t = CudaError
    cudaStreamNonBlocking, cudaHostAllocDefault, cudaEventDisableTiming = 1, 0, 2
    cudaMemcpyKind = Enum("cudaMemcpyKind", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost cudaMemcpyDeviceToDevice")
    cudaStreamCaptureMode = Enum("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")

    def __init__(self, host: SimulatedDevice) -> None:
        self.host = host
        self.calls: set[tuple[str, int]] = set()
        self.driver, self.count = 13000, 1
        self.name, self.capability = "Fake GPU", (8, 9)
        self.failing: dict[str, CudaError] = {}
        self.streams: list[Stream] = []
        self._graphs: dict[int, list[Any]] = {}
        self._numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        work = getattr(FakeCuda, "_" + name)

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.add((name, len(args)))
            if name in self.failing:
                return (self.failing[name], None)
            result = work(self, *args)
            return (
                CudaError.cudaSuccess,
                *([] if result is None else [result] if not isinstance(result, tuple) else result),
            )

        return call

    def _cudaDriverGetVersion(self) -> int:
        return self.driver

    def _cudaGetDeviceCount(self) -> int:
        return self.count

    def _cudaGetDeviceProperties(self, device: int) -> Any:
        major, minor = self.capability
        return SimpleNamespace(name=self.name.encode() + b"\0\0", major=major, minor=minor)

    def _cudaGetErrorName(self, error: CudaError) -> bytes:
        return error.name.encode()

    def _cudaGetErrorString(self, error: CudaError) -> bytes:
        return b"as the test wants it"

    def _cudaSetDevice(self, device: int) -> None: ...

    def _cudaGetDevice(self) -> int:
        return 0

    def _cudaMemGetInfo(self) -> tuple[int, int]:
        return self.host.memory()

    def _cudaStreamCreateWithFlags(self, flags: int) -> Stream:
        self.streams.append(Stream(7 + len(self.streams)))
        return self.streams[-1]

    def _cudaMalloc(self, size: int) -> int:
        return self.host.alloc(size, "fake")

    def _cudaFree(self, address: Any) -> None:
        self.host.free(address)
        SCRATCH_STREAMS.get(self.host, {}).pop(int(address), None)

    def _cudaHostAlloc(self, size: int, flags: int) -> int:
        return int(self.host.alloc_host(size).ctypes.data)

    def _cudaMemsetAsync(self, address: Any, value: int, count: int, stream: Stream) -> None:
        assert value == 0
        self.host.zero(address, count)

    def _cudaMemcpyAsync(self, target: Any, source: Any, count: int, kind: Any, stream: Stream) -> None:
        kinds = self.cudaMemcpyKind
        if kind == kinds.cudaMemcpyHostToDevice:
            self.host.upload(target, _array(source, count))
        elif kind == kinds.cudaMemcpyDeviceToHost:
            self.host.download(_array(target, count), source)
        else:
            self.host.copy(target, source, row_bytes=count)

    def _cudaMemcpy2DAsync(
        self,
        target: Any,
        target_pitch: int,
        source: Any,
        source_pitch: int,
        width: int,
        height: int,
        kind: Any,
        stream: Any,
    ) -> None:
        self.host.copy(
            target, source, row_bytes=width, rows=height, target_pitch=target_pitch, source_pitch=source_pitch
        )

    def _cudaEventCreateWithFlags(self, flags: int) -> Any:
        return SimpleNamespace(mark=Mark(0))

    def _cudaEventRecord(self, event: Any, stream: Stream) -> None:
        event.mark = self.host.mark()

    def _cudaEventSynchronize(self, event: Any) -> None:
        self.host.wait(event.mark)

    def _cudaStreamSynchronize(self, stream: Stream) -> None:
        self.host.wait(self.host.mark())

    def _cudaStreamBeginCapture(self, stream: Stream, mode: Any) -> None:
        assert self.host._recording is None
        self.host._recording = []

    def _cudaStreamEndCapture(self, stream: Stream) -> int:
        assert self.host._recording is not None
        number = next(self._numbers)
        self._graphs[number], self.host._recording = self.host._recording, None
        return number

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        self.host._captured[-graph] = self._graphs[graph]
        return -graph

    def _cudaGraphUpload(self, graph: int, stream: Stream) -> None: ...

    def _cudaGraphLaunch(self, graph: int, stream: Stream) -> None:
        self.host.replay(graph)  # type: ignore[arg-type]

    def _cudaGraphDestroy(self, graph: int) -> None: ...

    def _cudaGraphExecDestroy(self, graph: int) -> None: ...

    def _cudaEventDestroy(self, event: Any) -> None: ...

    def _cudaFreeHost(self, address: int) -> None: ...

    def _cudaStreamDestroy(self, stream: Stream) -> None: ...


def _array(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(int(address)))


class ILogger:
    Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)


def profile_range(engine: SimulatedEngine, name: str, index: int) -> InputRange | None:
    """The shapes that a profile of the engine's record allows an input; None where its shape is fixed."""
    assert engine.file is not None, "engines of a GPU know their profiles: a record stands beside them"
    [profile] = [profile for profile in engine.file.profiles if profile.index == index]
    return profile.inputs.get(name)


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Any) -> None:
        engine.device.forbid_in_capture("making a context")
        self._engine, self._shapes, self._profile = engine, {}, 0
        self._context: Any = None
        self._scratch = 0
        self.nvtx_verbosity = "DETAILED"

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._engine.device.forbid_in_capture("choosing a profile")
        self._profile = profile_index
        return any(profile.index == profile_index for profile in self._engine.file.profiles)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._engine.device.forbid_in_capture("choosing a shape")
        self._shapes[name] = tuple(shape)
        allowed = profile_range(self._engine, name, self._profile)
        return allowed is None or all(
            low <= size <= high for low, size, high in zip(allowed.min, shape, allowed.max, strict=True)
        )

    def set_device_memory(self, memory: int, size: int) -> None:
        self._context = self._engine.context(self._profile, self._shapes, memory, size)
        self._scratch = memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine.tensors:
            return False
        self._context.set_address(name, memory)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        self._engine.device.forbid_in_capture("asking whether a context may be captured")
        return FakeRtx.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._context is None:
            raise SeamError("a context runs without activation memory")
        users = SCRATCH_STREAMS.setdefault(self._engine.device, {})
        if users.setdefault(self._scratch, stream_handle) != stream_handle:
            raise SeamError("two contexts use one activation memory in different streams")
        self._context.enqueue()
        return True


class RuntimeCache:
    """IRuntimeCache; what it was given is in ``read``, ``asked`` counts how often it was asked for what it holds."""

    read: list[bytes] = []  # noqa: RUF012 - shared on purpose
    asked = 0

    def deserialize(self, content: bytes) -> bool:
        self.read.append(content)
        return content == b"kernels"

    def serialize(self) -> bytes:
        RuntimeCache.asked += 1
        return b"kernels"


class RuntimeConfig:
    """IRuntimeConfig."""

    def set_execution_context_allocation_strategy(self, strategy: int) -> None: ...

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        return True


class CudaEngine:
    """ICudaEngine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._names = list(engine.tensors)
        self.device_memory_size_v2 = engine.scratch_bytes
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_location(self, name: str) -> str:
        return "DEVICE"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._engine.tensors[name].dims

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TRT_DTYPES[self._engine.tensors[name].dtype])

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if self._engine.tensors[name].is_input else "OUTPUT"

    def get_aliased_input_tensor(self, name: str) -> str:
        return self._engine.tensors[name].alias or ""

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        allowed = profile_range(self._engine, name, profile)
        assert allowed is not None, f"{name} has no shape that changes"
        return [allowed.min, allowed.opt, allowed.max]

    def create_runtime_config(self) -> Any:
        return RuntimeConfig()

    def create_execution_context(self, config: Any) -> Context:
        return Context(self._engine)


class FakeRtx:
    """The module ``tensorrt_rtx`` over a simulator."""

    __version__ = "1.7.1.116"
    capturable = True
    ILogger = ILogger
    TensorLocation = SimpleNamespace(DEVICE="DEVICE")
    TensorIOMode = SimpleNamespace(INPUT="INPUT")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=1)
    CudaGraphStrategy = SimpleNamespace(DISABLED=0)
    ProfilingVerbosity = SimpleNamespace(NONE="NONE")
    ComputeCapability = IntEnum("ComputeCapability", {"NONE": 0, "CURRENT": 1, "SM75": 75, "SM80": 80, "SM89": 89})

    def __init__(self, host: SimulatedDevice) -> None:
        self._host = host

    def Runtime(self, log: Any) -> Any:
        self._host.forbid_in_capture("starting the library")

        def deserialize(data: Any) -> CudaEngine | None:
            if bytes(data[:7]) == b"damaged":
                log.log(ILogger.Severity.ERROR, "the header\n does not conform")
                log.log(ILogger.Severity.ERROR, "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime")
                return None
            return CudaEngine(self._host.load_engine(Path(data.filename)))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)
