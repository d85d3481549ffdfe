"""Finding what a GPU run needs before anything is loaded: cuda-bindings, a driver, a GPU, and one of the TensorRT libraries.

Everything missing or unfit is one :class:`BackendError` with the command that mends it. It allocates nothing on a device.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal

from dmtd_runtime.bundle.engine_record import is_new_enough
from dmtd_runtime.errors import BackendError

CudaBackend = Literal["tensorrt", "tensorrt-rtx"]
CUDA_BACKENDS: tuple[CudaBackend, ...] = ("tensorrt", "tensorrt-rtx")
CUDA_MAJOR = 13  # of cuda-bindings and both libraries' wheels
DEVICE_ORDER = "CUDA_DEVICE_ORDER"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtLibrary:
    """A library that builds and runs engines."""

    module: str
    major: int  # the version whose API this code speaks
    install: str  # the command


LIBRARIES: dict[CudaBackend, TensorRtLibrary] = {
    "tensorrt": TensorRtLibrary(module="tensorrt", major=11, install='pip install "dmtd[tensorrt]"'),
    "tensorrt-rtx": TensorRtLibrary(module="tensorrt_rtx", major=1, install='pip install "dmtd[tensorrt-rtx]"'),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """The GPU that a run would use."""

    device_id: int
    name: str
    compute_capability: str  # "8.9"


def import_tensorrt(backend: CudaBackend) -> Any:
    """The library that builds and runs engines of a backend.

    Raises:
        BackendError: it is not installed, cannot be imported, or is of another major version.
    """
    library = LIBRARIES[backend]
    try:
        module = importlib.import_module(library.module)
    except (ImportError, OSError) as error:  # OSError: the wheel is there, a library that it loads is not
        pass_interrupt_on(error)
        raise BackendError(
            f"{backend} cannot be imported ({_one_line(error)}); run: {library.install}{_other(backend)}"
        ) from None
    version = str(getattr(module, "__version__", "0"))
    if version.partition(".")[0] != str(library.major):
        raise BackendError(f"{backend}: got version {version}, expected {library.major}.x; run: {library.install}")
    return module


def _other(missing: CudaBackend) -> str:
    """The other library, where it is installed: what somebody who did not know there are two has asked for."""
    for name in CUDA_BACKENDS:
        with contextlib.suppress(ImportError, ValueError):  # ValueError: a module without a spec
            if name != missing and importlib.util.find_spec(LIBRARIES[name].module) is not None:
                return f" (or give --backend {name}, which is installed)"
    return ""


def pass_interrupt_on(error: BaseException) -> None:
    """Raise KeyboardInterrupt where it caused ``error``: Ctrl-C in a module of C++ that starts is told as an ImportError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        cause = cause.__cause__ or cause.__context__


def import_cuda() -> Any:
    """The module ``cuda.bindings.runtime``. BackendError where cuda-bindings is missing or of another CUDA release.

    GPUs are then numbered as nvidia-smi numbers them, unless the environment says otherwise or CUDA has started already.
    """
    os.environ.setdefault(DEVICE_ORDER, "PCI_BUS_ID")  # CUDA's own order begins with the fastest
    fix = f'pip install "cuda-bindings>={CUDA_MAJOR},<{CUDA_MAJOR + 1}"'
    try:
        version = str(importlib.import_module("cuda.bindings").__version__)
        runtime = importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as error:
        pass_interrupt_on(error)
        raise BackendError(f"cuda-bindings cannot be imported ({_one_line(error)}); run: {fix}") from None
    if version.partition(".")[0] != str(CUDA_MAJOR):
        raise BackendError(f"cuda-bindings is {version}, expected {CUDA_MAJOR}.x; run: {fix}")
    return runtime


def gpu_here(device_id: int = 0) -> GpuFacts:
    """The GPU that this process runs on, its name and capability as the CUDA runtime tells them: nothing else is asked for them.

    Raises:
        BackendError: cuda-bindings, the driver or the GPU is missing.
    """
    return look_at_gpu(import_cuda(), device_id)


def look_at_gpu(runtime: Any, device_id: int) -> GpuFacts:
    """The GPU ``device_id``, looked at through the CUDA runtime.

    Raises:
        BackendError: no driver, one that is too old, no GPU, or no such GPU.
    """
    error, driver = runtime.cudaDriverGetVersion()
    if error != runtime.cudaError_t.cudaSuccess or not driver:
        raise BackendError(
            "no NVIDIA driver on this machine; install one (https://www.nvidia.com/drivers), give the container the GPU "
            "(docker run --gpus all), or run on the CPU with: --backend onnxruntime"
        )
    error, count = runtime.cudaGetDeviceCount()
    if error == runtime.cudaError_t.cudaErrorInsufficientDriver or driver < CUDA_MAJOR * 1000:
        raise BackendError(
            f"the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, expected at least {CUDA_MAJOR}.0; "
            "update the driver"
        )
    if error != runtime.cudaError_t.cudaSuccess or not count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
        raise BackendError(f"no NVIDIA GPU can be used{hidden}: {_name(runtime, error)}; see `nvidia-smi`")
    if not 0 <= device_id < count:
        raise BackendError(f"got {device_id}, expected 0 to {count - 1}, the GPUs of this machine", param="device_id")
    error, properties = runtime.cudaGetDeviceProperties(device_id)
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendError(f"GPU {device_id} cannot be used: {_name(runtime, error)}; see `nvidia-smi`")
    return GpuFacts(
        device_id=device_id,
        name=properties.name.decode().rstrip("\0"),
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def capabilities(module: Any) -> dict[str, Any]:
    """Compute capabilities that TensorRT-RTX can be told to build our engines for: "8.9" -> its enumerator."""
    members = module.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}
    return {name: value for name, value in known.items() if is_new_enough(name)}


def _name(runtime: Any, error: Any) -> str:
    _, name = runtime.cudaGetErrorName(error)
    _, text = runtime.cudaGetErrorString(error)
    return f"{name.decode()}, {text.decode()}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
