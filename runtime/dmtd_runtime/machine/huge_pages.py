"""Weights in huge pages, on Linux: a step reads them all, and with pages of 4 kB it waits for their translations, too.

ONNX Runtime copies weights into memory that it takes as it comes. What a block of code has made the process allocate, and
filled, is moved into huge pages afterwards (``MADV_COLLAPSE``, Linux 6.1; before that the kernel is only asked to do so in
time). Nothing else is touched: not what was there before, not what is hardly used and would grow. A machine whose setting is
``never`` is left as it is, and what the kernel cannot do now it leaves undone: this is about speed alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dmtd_runtime.machine.hardware import huge_pages_setting

__all__ = ["HUGE_PAGE", "in_huge_pages"]

HUGE_PAGE = 2 << 20
_FULL_ENOUGH = 7 / 8
"""Of a huge page's bytes, that are in use already: moving it takes what is missing as well."""
_MADV_COLLAPSE = 25
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0 *(?:\[heap\])?\n")


@contextlib.contextmanager
def in_huge_pages() -> Iterator[None]:
    """What the block makes the process allocate, and fills, is in huge pages when it ends without an error."""
    if huge_pages_setting() in (None, "never"):
        yield
        return
    before = _anonymous()
    yield
    for part in _without(_anonymous(), before):
        for full in _full_blocks(part):
            _move(full)


def _anonymous() -> list[range]:
    """Where the process has private memory that is no file's, in order."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [range(int(start, 16), int(stop, 16)) for start, stop in _ANONYMOUS.findall(maps)]


def _without(parts: Sequence[range], others: Sequence[range]) -> Iterator[range]:
    """What of ``parts`` is in none of ``others``."""
    for part in parts:
        start = part.start
        for other in others:
            if start < other.stop and other.start < part.stop:
                if start < other.start:
                    yield range(start, other.start)
                start = max(start, other.stop)
        if start < part.stop:
            yield range(start, part.stop)


def _full_blocks(part: range) -> Iterator[range]:
    """The huge pages within ``part`` that are full enough; neighbours as one."""
    start, stop = -(-part.start // HUGE_PAGE) * HUGE_PAGE, part.stop // HUGE_PAGE * HUGE_PAGE
    if start >= stop:
        return
    in_use = np.zeros((stop - start) // mmap.PAGESIZE, np.uint8)
    if _libc().mincore(start, stop - start, in_use.ctypes.data) != 0:
        return
    full = (in_use & 1).reshape(-1, HUGE_PAGE // mmap.PAGESIZE).mean(axis=1) >= _FULL_ENOUGH
    (edges,) = np.nonzero(np.diff(full, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        yield range(start + first * HUGE_PAGE, start + last * HUGE_PAGE)


def _move(part: range) -> None:
    """Move it now, or where the kernel cannot yet do that, ask it to."""
    release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    _libc().madvise(part.start, len(part), _MADV_COLLAPSE if release >= (6, 1) else mmap.MADV_HUGEPAGE)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return libc
