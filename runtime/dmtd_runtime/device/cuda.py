"""A GPU: CUDA graphs through cuda-bindings, engines through TensorRT or TensorRT-RTX. No torch.

Rules it follows beside those of ``cuda_memory``: one execution context for each engine and set of shapes (a captured graph
keeps using its context's state, so a context's shapes never change after the first run); contexts get their activation
memory from outside, one buffer for all, because they run one after another; a graph is captured after every context in it
has run once. TensorRT-RTX compiles kernels at that first run, which blocks: it is timed, and what was compiled is saved at once.

Never executed on a GPU so far; ``simulator/`` is the same seam with numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime.bundle import contract
from dmtd_runtime.device.base import Address, Capture, Engine, EngineTensor
from dmtd_runtime.device.cuda_memory import CudaMemory
from dmtd_runtime.device.kernel_cache import KernelCache
from dmtd_runtime.device.libraries import CudaBackend, capabilities, import_tensorrt
from dmtd_runtime.device.library_log import make_log
from dmtd_runtime.errors import BackendError

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
REBUILD = "build the engines again with: dmtd build BUNDLE --force"
SLOW_START_S = 0.1  # a first run that takes longer has compiled kernels, which is worth a line in the log

logger = logging.getLogger("dmtd.cuda")


class CudaDevice(CudaMemory):
    """See :class:`dmtd_runtime.device.base.Device`.

    Args:
        backend: the library whose engines it runs.
        device_id: which GPU.

    Raises:
        BackendError: a library, the driver or the GPU is missing or unfit.
    """

    def __init__(self, backend: CudaBackend, *, device_id: int = 0) -> None:
        self.backend, self._trt = backend, import_tensorrt(backend)
        self.library_version = str(self._trt.__version__)
        super().__init__(device_id)
        self._graphs: dict[int, Any] = {}
        self._log = make_log(self._trt)
        try:
            self._runtime = self._trt.Runtime(self._log)
        except (TypeError, RuntimeError):  # pybind's words for a null pointer
            self.call("cudaStreamDestroy", self._stream)
            raise BackendError(
                f"{self.backend} cannot start on {self.name}: {self._log.take()}; see `dmtd doctor`"
            ) from None
        self._engines: list[CudaEngine] = []

    def load_engine(self, path: Path) -> Engine:
        data = np.memmap(path, np.uint8, "r")  # pages of the file, no copy in anonymous memory
        self._log.take()
        self.call("cudaGetDevice")  # the thread's current device is the one that the engine goes to
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(f"{path} cannot be loaded on {self.name}: {self._log.take()}; {self._rebuild()}")
        loaded = CudaEngine(self, self._trt, engine, path, self._log)
        self._engines.append(loaded)
        return loaded

    def capture(self, work: Callable[[], None]) -> Capture:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # The stream must leave the capture; the error of the work is the one to tell.
            error, graph = self._cuda.cudaStreamEndCapture(self._stream)
            if error == self._cuda.cudaError_t.cudaSuccess:
                self._cuda.cudaGraphDestroy(graph)
            raise
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

    def _rebuild(self) -> str:
        here = self.gpu.compute_capability
        if self.backend == "tensorrt-rtx" and here not in capabilities(self._trt):
            return f"TensorRT-RTX does not name compute capability {here}: dmtd build BUNDLE --backend tensorrt may serve it"
        return REBUILD

    def _release(self) -> None:
        for executable in self._graphs.values():
            self._cuda.cudaGraphExecDestroy(executable)
        for engine in self._engines:  # their weights go now, not when somebody collects garbage
            engine.release()
        self._runtime = None


class CudaEngine:
    """A deserialised engine. See :class:`dmtd_runtime.device.base.Engine`."""

    def __init__(self, device: CudaDevice, trt: Any, engine: Any, path: Path, log: Any) -> None:
        self.device, self.file, self.log = device, path.name, log
        self._trt, self._engine = trt, engine
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self._contexts: list[CudaContext] = []
        self._kernels: KernelCache | None = None
        self._config = self._make_config(path) if device.backend == "tensorrt-rtx" else None
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
        started = time.perf_counter()
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
        context.nvtx_verbosity = (
            self._trt.ProfilingVerbosity.NONE
        )  # engines are built with all of it, for whoever inspects them
        sizes = ", ".join(
            f"{name} {list(shape)}" for name, shape in shapes.items() if contract.cache_name(name) is None
        )
        made = CudaContext(self, context, sizes, time.perf_counter() - started, asks=self._config is not None)
        self._contexts.append(made)
        return made

    def started(self, sizes: str, seconds: float) -> None:
        """A context has run for the first time; ``seconds``, with its making."""
        if seconds > SLOW_START_S:
            logger.info("%s: %.1f s to start with %s: kernels were compiled", self.file, seconds, sizes)
        if self._kernels is not None:
            self._kernels.save()

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

    def __init__(self, engine: CudaEngine, context: Any, sizes: str, seconds: float, *, asks: bool) -> None:
        """``seconds`` it took to make; ``asks``: the library can tell whether the context may be captured."""
        self._engine, self._context, self._sizes, self._seconds, self._asks = engine, context, sizes, seconds, asks
        self._has_run = False

    def release(self) -> None:
        self._context = None

    def set_address(self, name: str, address: Address) -> None:
        if not self._context.set_tensor_address(name, address):
            raise BackendError(f"{self._engine.file}, {name}: address refused: {self._engine.log.take()}")

    def enqueue(self) -> None:
        started = time.perf_counter()
        if not self._context.execute_async_v3(self._engine.device.stream):
            raise BackendError(f"{self._engine.file}: the run was refused: {self._engine.log.take()}")
        if not self._has_run:
            self._has_run = True
            self._engine.started(self._sizes, self._seconds + time.perf_counter() - started)

    def is_capturable(self) -> bool:
        return not self._asks or bool(self._context.is_stream_capturable(self._engine.device.stream))
