"""glibc's heap in a long run on a CPU: large blocks are kept between steps, and what fragments is given back now and then.

Stands under ``run`` and ``trainer``. A step allocates the same large blocks as the one before, and fresh pages from the kernel
cost a tenth of its time; so freed blocks stay in the heap. Documents differ in length, though, and blocks of ever other sizes
leave holes: memory grew from 5 to 8 GB in 20 minutes. ``give_back`` returns the holes' pages, and it stayed at 5.4 GB. Does
nothing for a GPU's memory, and nothing under another C library.
"""

from __future__ import annotations

import ctypes
import platform

GIVE_BACK_EVERY_STEPS = 50
"""A trim takes some milliseconds, and the pages it returns must be fetched anew."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK_BYTES = 1 << 30
_NEVER = 2**31 - 1


def keep_large_blocks() -> bool:
    """Let glibc keep freed blocks of any size up to 1 GiB; whether it was told so."""
    libc = _glibc()
    if libc is None:
        return False
    told = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES)
    return bool(told and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back() -> bool:
    """Return free pages inside the heap to the kernel; whether there were any."""
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
