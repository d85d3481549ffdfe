"""Memory of a build: how much it will take, said before it starts, and how much it took.

Anonymous memory is what counts: pages of the mapped weights file belong to the page cache and can be taken back at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator
from pathlib import Path

from dmtd_export.errors import ExportError
from dmtd_runtime.cli.common import human_bytes
from dmtd_runtime.machine.hardware import memory_bytes

# TensorRT-RTX 1.7 holds the weights twice (its own copy and the plan); the rest is code generation, by layers and profiles.
# Measured: 1.9 times an engine of 5.7 GB; 0.56 GB for 22 layers of 157 MB, 0.37 GB for 8 of 58 MB with three profiles.
WEIGHT_COPIES = 2.1
BASE_BYTES = 192 << 20
LAYER_BYTES = 6 << 20
PROFILE_LAYER_BYTES = 2 << 20

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TIGHT_BYTES, _GLIBC_BYTES = 64 << 10, 128 << 10


def expected_peak_bytes(weight_bytes: int, layers: int, profiles: int) -> int:
    """Anonymous memory that building one engine takes at most."""
    return int(WEIGHT_COPIES * weight_bytes) + BASE_BYTES + layers * (LAYER_BYTES + profiles * PROFILE_LAYER_BYTES)


def check_memory(needed: int, what: str) -> None:
    """Refuse a build that this machine cannot hold.

    Raises:
        ExportError: with what is available and needed.
    """
    available = memory_bytes()[1]
    if available is not None and needed > available:
        raise ExportError(
            f"building {what} takes up to {human_bytes(needed)} of memory, {human_bytes(available)} are available; "
            "free some, or build on a larger machine: engines for --compute-capability, or any, may be copied"
        )


@contextlib.contextmanager
def tight_heap() -> Iterator[None]:
    """Let freed blocks of 64 KiB and more go back to the system at once: code generation leaves holes among smaller ones.

    SmolLM2-135M's thinking layers (157 MB of weights) peak at 0.58 GB with it and at 0.74 to 0.82 GB without, in the same time.
    Afterwards glibc has its usual thresholds, which then no longer grow by themselves.
    """
    _set_thresholds(_TIGHT_BYTES)
    try:
        yield
    finally:
        _set_thresholds(_GLIBC_BYTES)


def _set_thresholds(size: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, size)


def give_back() -> None:
    """Return freed heap to the system, so that one build's leavings do not stand beside the next one's peak."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def anonymous_bytes() -> int:
    """Anonymous memory of this process now; 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
