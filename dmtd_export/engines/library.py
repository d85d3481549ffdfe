"""The two builder libraries behind one seam: TensorRT 11 and TensorRT-RTX 1, whose Python APIs are nearly one.

Everything that differs stands here: what is installed and fits, which GPU an engine is for, and the few settings that only
one of them has. ``builder`` uses ``Library.module`` for the rest. The simulator has no library: its engines are the
ONNX graphs themselves, executed on the CPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmtd_export.engines.plan import Target
from dmtd_runtime.bundle.engine_record import ANY_GPU, OLDEST_CAPABILITY, EngineBackend, is_new_enough
from dmtd_runtime.device.libraries import CudaBackend, capabilities, gpu_here, import_tensorrt
from dmtd_runtime.errors import BackendError
from dmtd_runtime.machine.hardware import look_at_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """An imported builder library; ``module`` is None for the simulator."""

    backend: EngineBackend
    version: str
    module: Any


def load_library(backend: EngineBackend | None) -> Library:
    """Import the backend asked for, or the first that is installed: tensorrt where there is a GPU, else tensorrt-rtx.

    Raises:
        BackendError: it is not installed, or of another major version; with the pip line.
    """
    if backend == "simulator":
        return Library(backend="simulator", version="1", module=None)
    if backend is not None:
        return _import(backend)
    order: list[CudaBackend] = ["tensorrt", "tensorrt-rtx"] if look_at_gpus()[0] else ["tensorrt-rtx", "tensorrt"]
    problems = []
    for name in order:
        try:
            return _import(name)
        except BackendError as error:
            problems.append(str(error))
    raise BackendError(f"dmtd build needs TensorRT-RTX or TensorRT: {problems[0]}")


def _import(backend: CudaBackend) -> Library:
    module = import_tensorrt(backend)
    return Library(backend=backend, version=str(module.__version__), module=module)


def target_of(library: Library, compute_capability: str | None) -> Target:
    """Which GPU engines of ``library`` are for.

    Raises:
        BackendError: a compute capability that the backend cannot build for, or a GPU that it needs and that is not there.
    """
    if library.backend == "tensorrt-rtx":
        return _rtx_target(library, compute_capability or ANY_GPU)
    if compute_capability is not None:
        raise BackendError(
            f"got {compute_capability}, but {library.backend} builds for the machine it "
            "runs on; leave it out, or use --backend tensorrt-rtx",
            param="compute_capability",
        )
    if library.backend == "simulator":
        return Target(backend="simulator", version=library.version)
    try:
        gpu = gpu_here()
    except BackendError as error:
        raise BackendError(
            f"tensorrt times its kernels on the GPU it builds for: {error}; to build without one use: "
            "--backend tensorrt-rtx"
        ) from None
    if not is_new_enough(gpu.compute_capability):
        raise BackendError(_too_old(f"{gpu.name} has compute capability {gpu.compute_capability}"))
    return Target(
        backend="tensorrt", version=library.version, compute_capability=gpu.compute_capability, gpu_name=gpu.name
    )


def _rtx_target(library: Library, wanted: str) -> Target:
    known = capabilities(library.module)
    if wanted != ANY_GPU and wanted not in known:
        if re.fullmatch(r"\d+\.\d+", wanted) and not is_new_enough(wanted):
            raise BackendError(_too_old(f"got {wanted}"), param="compute_capability")
        raise BackendError(
            f"got {wanted}, TensorRT-RTX {library.version} names {', '.join(known)}; leave it out: engines for any GPU run on "
            f"compute capability {OLDEST_CAPABILITY} and later",
            param="compute_capability",
        )
    return Target(backend=library.backend, version=library.version, compute_capability=wanted, supported=tuple(known))


def _too_old(what: str) -> str:
    return (
        f"{what}, engines need {OLDEST_CAPABILITY} or later: TensorRT's attention does, and no bfloat16 or float32 product can "
        "be built for older ones; run the bundle with: --backend onnxruntime"
    )


def configure(library: Library, config: Any, target: Target, timing_cache: Path | None) -> Any:
    """Set what only one backend has. Returns the timing cache object, which must live as long as ``config``, or None."""
    module, flags = library.module, library.module.BuilderFlag
    config.clear_flag(flags.TF32)  # float32 engines are held to the float32 oracle
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if library.backend == "tensorrt-rtx":
        if hasattr(flags, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(flags.REQUIRE_USER_ALLOCATION)  # no allocation in a run: a CUDA graph can capture it
        if target.compute_capability != ANY_GPU:
            config.num_compute_capabilities = 1
            config.set_compute_capability(capabilities(module)[target.compute_capability], 0)
        return None
    content = timing_cache.read_bytes() if timing_cache is not None and timing_cache.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None:  # of another version: start afresh
        cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return cache
