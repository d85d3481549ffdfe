"""The stand-ins refuse what a driver refuses: without that, the tests beside this one would find nothing."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.cuda_host

SIZE = 1024
OK, INVALID, CONFIGURATION, RESOURCE, UNSUPPORTED, INVALIDATED, IMPLICIT, CAPTURED = 0, 1, 9, 400, 900, 901, 906, 907


class Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class Runtime:
    """Calls of the stand-in runtime that must go well, and those whose error is looked at."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.kernel = ctypes.create_string_buffer(1)
        register = getattr(cuda._library, "__cudaRegisterFunction")
        register(None, self.kernel, None, b"kernel", *[None] * 6)

    def error(self, name: str, *args: object) -> int:
        return int(getattr(self.cuda, name)(*args)[0])

    def make(self, name: str, *args: object) -> Any:
        error, result = getattr(self.cuda, name)(*args)
        assert error == OK, name
        return result

    def launch(self, stream: int, grid: tuple[int, int, int] = (1, 1, 1), threads: int = 32, shared: int = 0) -> int:
        size = ctypes.c_size_t(shared)
        launch = self.cuda._library.cudaLaunchKernel
        return launch(self.kernel, Dim3(*grid), Dim3(threads, 1, 1), None, size, ctypes.c_void_p(stream))

    def capture(self, stream: int) -> None:
        assert self.error("cudaStreamBeginCapture", stream, 0) == OK


@pytest.fixture
def runtime() -> Runtime:
    from cuda.bindings import runtime as cuda

    return Runtime(cuda)


def test_launches_are_checked(runtime: Runtime) -> None:
    stream = runtime.make("cudaStreamCreateWithFlags", 1)
    assert runtime.launch(stream) == OK
    assert runtime.launch(stream, shared=48 << 10) == OK
    for grid in ((0, 1, 1), (1, 65536, 1), (1, 1, 0)):
        assert runtime.launch(stream, grid) == CONFIGURATION
    assert runtime.launch(stream, threads=0) == runtime.launch(stream, threads=1025) == CONFIGURATION
    assert runtime.launch(stream, shared=(48 << 10) + 1) == INVALID
    assert runtime.launch(12345) == RESOURCE


def test_copies_are_checked_and_done(runtime: Runtime) -> None:
    device, pinned = runtime.make("cudaMalloc", SIZE), runtime.make("cudaHostAlloc", SIZE, 0)
    stream, array = runtime.make("cudaStreamCreateWithFlags", 1), np.arange(SIZE, dtype=np.uint8)
    back = np.zeros_like(array)
    to_device, to_host = 1, 2
    assert runtime.error("cudaMemcpyAsync", device, array.ctypes.data, SIZE, to_device, stream) == OK
    assert runtime.error("cudaMemcpyAsync", pinned, device, SIZE, to_host, stream) == OK
    assert runtime.error("cudaMemcpy", back.ctypes.data, device, SIZE, to_host) == OK
    assert np.array_equal(back, array)
    assert runtime.error("cudaMemcpyAsync", device, pinned, SIZE + 1, to_device, stream) == INVALID
    assert runtime.error("cudaMemcpyAsync", pinned, array.ctypes.data, SIZE, to_device, stream) == INVALID
    assert runtime.error("cudaMemcpyAsync", pinned, device, SIZE, to_device, stream) == INVALID
    assert runtime.error("cudaMemsetAsync", pinned, 0, SIZE, stream) == INVALID
    assert runtime.error("cudaFree", device) == runtime.error("cudaFreeHost", pinned) == OK
    assert runtime.error("cudaFree", device) == INVALID


def test_what_a_copy_reads_is_written_too_early(
    tmp_path: Path,
) -> None:
    """In a process of its own, whose trace tells: nothing is returned to who did it."""
    program = """
import ctypes
from cuda.bindings import runtime as cuda
stream, device = cuda.cudaStreamCreateWithFlags(1)[1], cuda.cudaMalloc(8)[1]
pinned, event = cuda.cudaHostAlloc(8, 0)[1], cuda.cudaEventCreateWithFlags(2)[1]
for wait in (True, False):
    cuda.stand_in_mark(f"wait {wait}")
    cuda.cudaMemcpyAsync(device, pinned, 8, 1, stream)
    cuda.cudaEventRecord(event, stream)
    if wait:
        cuda.cudaEventSynchronize(event)
    ctypes.memset(pinned, 1 + wait, 8)
    cuda.cudaEventSynchronize(event)
"""
    trace = tmp_path / "trace.tsv"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "STAND_IN_TRACE": str(trace)}, check=True)
    names = [line.split("\t")[0] for line in trace.read_text().splitlines()]
    assert names.index("overwritten") > names.index("mark", 1 + names.index("mark")), "the second round"
    assert names.count("overwritten") == 1


@pytest.mark.parametrize(
    ("name", "args", "error"),
    [
        ("cudaMalloc", (SIZE,), UNSUPPORTED),
        ("cudaHostAlloc", (SIZE, 0), UNSUPPORTED),
        ("cudaFree", ("device",), UNSUPPORTED),
        ("cudaDeviceSynchronize", (), UNSUPPORTED),
        ("cudaStreamSynchronize", ("stream",), UNSUPPORTED),
        ("cudaStreamSynchronize", (0,), IMPLICIT),
        ("cudaMemcpy", ("device", "array", SIZE, 1), IMPLICIT),
        ("cudaMemcpyAsync", ("device", "array", SIZE, 1, 0), IMPLICIT),
        ("cudaMemcpyAsync", ("device", "array", SIZE, 1, "stream"), UNSUPPORTED),
        ("cudaMemsetAsync", ("device", 0, SIZE, 0), IMPLICIT),
        ("cudaEventSynchronize", ("event",), CAPTURED),
    ],
)
def test_what_a_capture_forbids_spoils_it(runtime: Runtime, name: str, args: tuple[object, ...], error: int) -> None:
    array = np.zeros(SIZE, np.uint8)
    things: dict[object, Any] = {"device": runtime.make("cudaMalloc", SIZE), "array": array.ctypes.data}
    things |= {"stream": runtime.make("cudaStreamCreate"), "event": runtime.make("cudaEventCreateWithFlags", 2)}
    stream = things["stream"]
    runtime.capture(stream)
    assert runtime.launch(stream) == OK
    assert runtime.error("cudaEventRecord", things["event"], stream) == OK
    assert runtime.error(name, *(things.get(value, value) for value in args)) == error
    assert runtime.launch(stream) == INVALIDATED
    assert runtime.error("cudaStreamEndCapture", stream) == INVALIDATED
    assert runtime.launch(stream) == OK


def test_a_capture_of_a_non_blocking_stream_lets_the_legacy_stream_work_and_is_replayed(runtime: Runtime) -> None:
    stream, pinned = runtime.make("cudaStreamCreateWithFlags", 1), runtime.make("cudaHostAlloc", SIZE, 0)
    device = runtime.make("cudaMalloc", SIZE)
    runtime.capture(stream)
    assert runtime.error("cudaMemcpyAsync", device, pinned, SIZE, 1, stream) == OK
    assert runtime.launch(stream) == runtime.launch(0) == OK
    graph = runtime.make("cudaStreamEndCapture", stream)
    assert runtime.error("cudaGraphLaunch", runtime.make("cudaGraphInstantiate", graph, 0), stream) == OK


def test_the_device_is_one_of_compute_capability_9(runtime: Runtime) -> None:
    from dmtd_runtime.device.libraries import import_cuda, look_at_gpu

    gpu = look_at_gpu(import_cuda(), 0)
    assert (gpu.name, gpu.compute_capability) == ("Stand-in", "9.0")
