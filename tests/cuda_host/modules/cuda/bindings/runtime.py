"""``cuda.bindings.runtime`` over the stand-in of libcudart: every call returns (error, results ...), as the real ones do.

The library is the one that ONNX Runtime's CUDA provider has loaded, so a stream made here is one that it knows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

_library = ctypes.CDLL("libcudart.so.13")
_library.cudaGetErrorName.restype = _library.cudaGetErrorString.restype = ctypes.c_char_p

cudaStreamDefault, cudaStreamNonBlocking = 0, 1
cudaHostAllocDefault = 0
cudaEventDefault, cudaEventDisableTiming = 0, 2


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidConfiguration = 9
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureImplicit = 906
    cudaErrorCapturedEvent = 907
    cudaErrorUnknown = 999

    @classmethod
    def _missing_(cls, value: object) -> cudaError_t:
        return cls.cudaErrorUnknown


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


@dataclass(frozen=True, slots=True)
class cudaDeviceProp:
    """The fields that the runtime reads."""

    name: bytes
    major: int
    minor: int


class _Handle(int):
    """A stream, event or graph. The real ones have ``getPtr`` besides."""

    def getPtr(self) -> int:
        return int(self)


# What a call takes: p a pointer or handle, n a size, i an int, u an unsigned number of 64 bits. What it returns stands
# before the arguments in C, by address: P a handle, S a size, I an int.
_CALLS = {
    "cudaDriverGetVersion": ("I", ""),
    "cudaRuntimeGetVersion": ("I", ""),
    "cudaGetDeviceCount": ("I", ""),
    "cudaGetDevice": ("I", ""),
    "cudaSetDevice": ("", "i"),
    "cudaDeviceSynchronize": ("", ""),
    "cudaDeviceGetAttribute": ("I", "ii"),
    "cudaMemGetInfo": ("SS", ""),
    "cudaMalloc": ("P", "n"),
    "cudaFree": ("", "p"),
    "cudaHostAlloc": ("P", "ni"),
    "cudaFreeHost": ("", "p"),
    "cudaMemcpy": ("", "ppni"),
    "cudaMemcpyAsync": ("", "ppnip"),
    "cudaMemcpy2DAsync": ("", "pnpnnnip"),
    "cudaMemset": ("", "pin"),
    "cudaMemsetAsync": ("", "pinp"),
    "cudaStreamCreate": ("P", ""),
    "cudaStreamCreateWithFlags": ("P", "i"),
    "cudaStreamDestroy": ("", "p"),
    "cudaStreamSynchronize": ("", "p"),
    "cudaStreamWaitEvent": ("", "ppi"),
    "cudaStreamBeginCapture": ("", "pi"),
    "cudaGraphInstantiate": ("P", "pu"),
    "cudaGraphLaunch": ("", "pp"),
    "cudaGraphDestroy": ("", "p"),
    "cudaGraphExecDestroy": ("", "p"),
    "cudaEventCreate": ("P", ""),
    "cudaEventCreateWithFlags": ("P", "i"),
    "cudaEventDestroy": ("", "p"),
    "cudaEventRecord": ("", "pp"),
    "cudaEventSynchronize": ("", "p"),
}
_TYPES = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_size_t,
    "i": ctypes.c_int,
    "u": ctypes.c_ulonglong,
    "P": ctypes.c_void_p,
    "S": ctypes.c_size_t,
    "I": ctypes.c_int,
}


def _call(name: str, results: str, arguments: str, *values: Any) -> tuple[Any, ...]:
    if len(values) != len(arguments):
        raise TypeError(f"{name}: got {len(values)} arguments, expected {len(arguments)}")
    cells = [_TYPES[kind]() for kind in results]
    given = [_TYPES[kind](int(value)) for kind, value in zip(arguments, values, strict=True)]
    error = cudaError_t(getattr(_library, name)(*map(ctypes.byref, cells), *given))
    read = [cell.value or 0 for cell in cells]
    return error, *(_Handle(value) if kind == "P" else value for kind, value in zip(results, read, strict=True))


def __getattr__(name: str) -> Callable[..., tuple[Any, ...]]:
    if name not in _CALLS:
        raise AttributeError(f"the stand-in of cuda.bindings.runtime has no {name}; add it to _CALLS")
    return functools.partial(_call, name, *_CALLS[name])


def cudaStreamEndCapture(stream: int) -> tuple[Any, ...]:
    """The one call whose result comes last in C."""
    graph = ctypes.c_void_p()
    error = cudaError_t(_library.cudaStreamEndCapture(ctypes.c_void_p(int(stream)), ctypes.byref(graph)))
    return error, _Handle(graph.value or 0)


def cudaGetDeviceProperties(device: int) -> tuple[Any, ...]:
    """The name stands at the beginning of C's struct; numbers are asked for one by one."""
    struct = ctypes.create_string_buffer(8192)
    error = cudaError_t(_library.cudaGetDeviceProperties(struct, device))
    attributes = cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor
    major, minor = (_call("cudaDeviceGetAttribute", "I", "ii", attribute, device)[1] for attribute in attributes)
    return error, cudaDeviceProp(name=struct.raw[:256], major=major, minor=minor)


def cudaGetErrorName(error: cudaError_t) -> tuple[Any, ...]:
    return cudaError_t.cudaSuccess, _library.cudaGetErrorName(int(error))


def cudaGetErrorString(error: cudaError_t) -> tuple[Any, ...]:
    return cudaError_t.cudaSuccess, _library.cudaGetErrorString(int(error))


def stand_in_mark(words: str) -> None:
    """A line of the harness in the trace; cuda-bindings have no such call."""
    _library.stand_in_mark(words.encode())
