"""Opening ONNX Runtime sessions and binding their inputs and outputs once.

An absent execution provider makes ONNX Runtime fall back to the CPU without a word; here that is an error.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime import contract
from dmtd_runtime.backends.base import Array, BackendOptions, RunStats
from dmtd_runtime.device.libraries import import_cuda
from dmtd_runtime.errors import BackendError, BundleError
from dmtd_runtime.machine import default_threads
from dmtd_runtime.manifest import DTYPE_BYTES, GraphInfo

INSTALL_HINT = 'install one of: pip install "dmtd[cpu]"   or, on a machine with an NVIDIA GPU: pip install "dmtd[gpu]"'
ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16
# Inputs that nodes read on the host on every provider: GroupQueryAttention its total length, Split and Expand their sizes.
READ_ON_HOST = (
    contract.total_sequence_length("thinking"),
    contract.total_sequence_length("late"),
    contract.SLOT_ROWS,
    contract.PAD_ROWS,
)
CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"


def import_onnxruntime() -> Any:
    """The onnxruntime module; BackendError with the pip line where it is missing or installed twice."""
    present = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(present) == 2:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; run: "
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "dmtd[gpu]"   (or "dmtd[cpu]")'
        )
    # From 1.32 on ONNX Runtime collects facts about the machine unless this stands before its first import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C within the import, which its C++ side dresses up
            raise KeyboardInterrupt from None
        raise BackendError(f"ONNX Runtime cannot be imported ({error}); {INSTALL_HINT}") from None
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_cuda_provider(ort: Any) -> None:
    """BackendError with the fix where this ONNX Runtime cannot use a GPU at all."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {CUDA_PROVIDER}, only {', '.join(ort.get_available_providers())}; "
            'run: pip uninstall -y onnxruntime && pip install "dmtd[gpu]"'
        )


def shared_stream(device_id: int) -> int | None:
    """A CUDA stream for all sessions of a bundle; None without cuda-bindings: each session then has a stream of its own.

    It is an ordinary, blocking stream: ``OrtValue.update_inplace`` copies on the default stream, which waits for such ones
    and lets them wait, so an input is never overwritten under a run that still reads it. It lives as long as the process.
    """
    check_cuda_provider(import_onnxruntime())
    try:
        runtime = import_cuda()
    except BackendError:
        return None
    error = runtime.cudaSetDevice(device_id)[0]
    if error == runtime.cudaError_t.cudaSuccess:
        error, stream = runtime.cudaStreamCreate()
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendError(f"--device cuda: GPU {device_id} cannot be used ({error.name}); see `dmtd doctor`")
    return int(stream)


def provider_options(options: BackendOptions, *, stream: int | None, graphs: bool) -> dict[str, str]:
    """Options of the CUDA provider."""
    chosen = {"device_id": str(options.device_id)}
    if stream is not None:
        chosen["user_compute_stream"] = str(stream)
    if graphs:
        chosen["enable_cuda_graph"] = "1"
    return chosen


def open_session(path: Path, options: BackendOptions, *, stream: int | None = None, graphs: bool = False) -> Any:
    """An InferenceSession whose first provider is the one asked for; ``stream`` and ``graphs`` are of CUDA."""
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads or default_threads()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # its errors come as exceptions; a library writes nothing to stderr
    # The two sessions of a bundle run in turn: a pool that spins on after its run takes the cores from the other one.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if not options.prepack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    providers: list[Any] = [CPU_PROVIDER]
    if options.device == "cuda":
        check_cuda_provider(ort)
        providers = [(CUDA_PROVIDER, provider_options(options, stream=stream, graphs=graphs)), CPU_PROVIDER]
    try:
        session = ort.InferenceSession(str(path), settings, providers=providers)
    except Exception as error:
        raise BundleError(f"ONNX Runtime cannot load {path}: {_first_line(error)}; export the bundle again") from error
    wanted = CUDA_PROVIDER if options.device == "cuda" else CPU_PROVIDER
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"--device {options.device}: ONNX Runtime fell back to {session.get_providers()[0]}; "
            "see `dmtd doctor` for the driver, CUDA and cuDNN it needs"
        )
    return session


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Memory that graphs are bound to by address. ``array`` is the host's view of it, None on a GPU."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any  # keeps the memory alive
    array: Array | None

    def rows(self, first: int, count: int) -> Buffer:
        """``count`` entries of the first axis, from ``first`` on."""
        stride = math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]
        return replace(
            self,
            address=self.address + first * stride,
            shape=(count, *self.shape[1:]),
            array=None if self.array is None else self.array[first : first + count],
        )


def host_buffer(array: Array) -> Buffer:
    """A buffer over a numpy array, which must be contiguous."""
    assert array.flags.c_contiguous, "a bound array is contiguous"
    return Buffer(address=array.ctypes.data, shape=array.shape, dtype=array.dtype.name, owner=array, array=array)


def device_buffer(shape: Sequence[int], dtype: str, device_id: int) -> Buffer:
    """A zeroed buffer on a GPU. It is bound by address, so bfloat16, which numpy lacks, may be made as another 16-bit type."""
    ort = import_onnxruntime()
    size = max(1, math.prod(shape))  # an empty value has no address to bind, and a chunk without logits binds one
    zeros = np.zeros(size, np.uint16 if dtype == "bfloat16" else dtype)
    value = ort.OrtValue.ortvalue_from_numpy(zeros, "cuda", device_id)
    return Buffer(address=value.data_ptr(), shape=tuple(shape), dtype=dtype, owner=value, array=None)


class Binding:
    """One (graph, row counts): every input and output bound once, written in place before each run.

    ``arrays`` are the small inputs by name. On the CPU they are bound themselves; on a GPU they are pushed before a run.
    """

    def __init__(
        self,
        session: Any,
        graph: GraphInfo,
        sizes: Mapping[str, int],
        buffers: Mapping[str, Buffer],
        options: BackendOptions,
        *,
        graph_id: int | None = None,
    ) -> None:
        """``buffers`` are caches, thought and logits by input or output name; ``sizes`` resolves symbolic dimensions.

        ``graph_id``: in a session with CUDA graphs, the one that these runs are captured into; -1 for none. None elsewhere.
        """
        ort = import_onnxruntime()
        self._run_options: tuple[Any, Any] = (None, None)  # of a run that is waited for, and of one that is not
        if options.device == "cuda":
            self._run_options = (ort.RunOptions(), ort.RunOptions())
            self._run_options[1].add_run_config_entry("disable_synchronize_execution_providers", "1")
            for run_options in self._run_options if graph_id is not None else ():
                run_options.add_run_config_entry("gpu_graph_id", str(graph_id))
        self._graph_id = graph_id
        self.arrays: dict[str, Array] = {}
        self._session = session
        self._binding = session.io_binding()
        self._pushed: list[tuple[Any, Array]] = []
        self._kept: list[Any] = list(buffers.values())
        self._device = (options.device, options.device_id if options.device == "cuda" else 0)
        for info in graph.inputs:
            if info.name in buffers:
                self._bind(self._binding.bind_input, info.name, buffers[info.name])
                continue
            array = np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in info.dims], info.dtype)
            pushed = options.device == "cuda" and info.name not in READ_ON_HOST
            value = ort.OrtValue.ortvalue_from_numpy(array, *(self._device if pushed else ()))
            if pushed:
                self._pushed.append((value, array))
            self._binding.bind_ortvalue_input(info.name, value)
            self.arrays[info.name] = array
            self._kept += [value, array]
        for info in graph.outputs:
            self._bind(self._binding.bind_output, info.name, buffers[info.name])

    def run(self, stats: RunStats, *, wait: bool = True) -> None:
        """Run the graph over what stands in ``arrays``; errors of ONNX Runtime become BackendError.

        Without ``wait`` a GPU may still be at it on return: only for what the same stream goes on with.
        """
        start = time.perf_counter()
        for value, array in self._pushed:
            value.update_inplace(array)
        try:
            self._session.run_with_iobinding(self._binding, self._run_options[not wait])
        except Exception as error:
            hint = "; try --no-cuda-graphs" if self._graph_id not in (None, -1) else ""
            raise BackendError(f"ONNX Runtime failed: {_first_line(error)}{hint}") from error
        stats.session_seconds += time.perf_counter() - start

    def _bind(self, bind: Callable[..., None], name: str, buffer: Buffer) -> None:
        device = ("cpu", 0) if buffer.array is not None else self._device
        element: Any = ONNX_BFLOAT16 if buffer.dtype == "bfloat16" else np.dtype(buffer.dtype)
        bind(name, *device, element, buffer.shape, buffer.address)
