"""Opening ONNX Runtime sessions.

An absent execution provider makes ONNX Runtime fall back to the CPU without a word; here that is an error.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmtd_runtime.errors import BackendError, BundleError
from dmtd_runtime.machine.hardware import default_threads
from dmtd_runtime.machine.memory import ran_out
from dmtd_runtime.ort.cuda_provider import CUDA_PROVIDER, prepare
from dmtd_runtime.ort.kernels.library import LIBRARY, instruction_set
from dmtd_runtime.ort.library import import_onnxruntime
from dmtd_runtime.ort.links import graph_source, path_problem

CPU_PROVIDER = "CPUExecutionProvider"
MOST_SHOWN = 300  # letters of a message
# Kernels of attention that may be taken, by the provider's numbers: flash, memory-efficient and unfused. Left to itself the
# provider takes cuDNN's from Hopper on, which are compiled for every shape, thread and session anew, and fail without another
# kernel being tried; for single rows XQA comes before all of them.
ATTENTION_KERNELS = 1 | 2 | 16
CUDNN_ATTENTION = "ORT_ENABLE_CUDNN_FLASH_ATTENTION"  # a variable of ONNX Runtime: 1 lets cuDNN's be tried all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOptions:
    """A session on a GPU: ``stream`` is for all that it does, ``graphs`` lets runs be captured as CUDA graphs."""

    device_id: int = 0
    stream: int | None = None
    graphs: bool = False


def provider_options(cuda: CudaOptions) -> dict[str, str]:
    """Options of the CUDA provider."""
    chosen = {
        "device_id": str(cuda.device_id),
        "use_tf32": "0",  # its default rounds float32 products to 10 bits on every card since Ampere
        "arena_extend_strategy": "kSameAsRequested",  # not twice as much each time
    }
    if os.environ.get(CUDNN_ATTENTION) != "1":
        chosen["sdpa_kernel"] = str(ATTENTION_KERNELS)
    if cuda.stream is not None:
        chosen["user_compute_stream"] = str(cuda.stream)
    if cuda.graphs:
        chosen["enable_cuda_graph"] = "1"
    return chosen


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    prepack: bool = True,
    alone: bool = False,
    kernels: bool = False,
    cuda: CudaOptions | None = None,
    weights: Mapping[str, Any] | None = None,
    folded: Mapping[str, Any] | None = None,
) -> Any:
    """An InferenceSession whose first provider is the one asked for.

    Args:
        path: the graph.
        threads: None: one for each core this process may use.
        prepack: weights are copied into the kernels' own layout.
        alone: no other session runs in turn with it.
        kernels: products over blocks are ours (``kernels``) where the processor has them; for float32 graphs.
        cuda: None: on the CPU.
        weights: initializers by name that are in memory already; they must outlive the session.
        folded: on a GPU, initializers on the host that constants are made of, where the graph's path may not be taken.

    Raises:
        BundleError: the graph cannot be loaded.
        BackendError: ONNX Runtime or its CUDA provider is missing or unfit.
        MemoryError: there is too little for it.
    """
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads or default_threads()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # its errors come as exceptions; a library writes nothing to stderr
    if not alone:  # a pool that spins on after its run takes the cores from the next session's
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    if not prepack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    if kernels and cuda is None and instruction_set() is not None:
        settings.register_custom_ops_library(str(LIBRARY))
    providers: list[Any] = [CPU_PROVIDER]
    on_host = weights or {}
    if cuda is not None:
        for name, value in on_host.items():
            settings.add_initializer(name, value)
        on_host = folded or {}
        prepare(ort, cuda.device_id)
        settings.enable_mem_pattern = False  # a second run of the same shapes would allocate everything anew
        settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        providers = [(CUDA_PROVIDER, provider_options(cuda)), CPU_PROVIDER]
    try:
        # Without the fallback, which would print to stdout and go on with the CPU.
        with graph_source(path, settings, on_host) as source:
            session = ort.InferenceSession(source, settings, providers=providers, enable_fallback=0)
    except Exception as error:
        if ran_out(error):
            raise MemoryError(f"ONNX Runtime, opening {path}: {first_line(error)}") from error
        raise BundleError(
            f"ONNX Runtime cannot load {path}: {first_line(error)}; {path_problem(path) or 'export the bundle again'}"
        ) from error
    wanted = CPU_PROVIDER if cuda is None else CUDA_PROVIDER
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"ONNX Runtime fell back to {session.get_providers()[0]}; "
            "see `dmtd doctor` for the driver, CUDA and cuDNN it needs",
            param="device",
        )
    return session


def first_line(error: Exception) -> str:
    """What an exception of ONNX Runtime says first, cut at a word where it is long."""
    line, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(line, MOST_SHOWN, placeholder=" ...", break_long_words=False, break_on_hyphens=False)
