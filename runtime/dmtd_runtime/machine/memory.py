"""Memory that this process may still take, and the one line that says that it did not suffice.

Libraries tell it in many ways: ``MemoryError``, ``OSError`` of ENOMEM, ``std::bad_alloc`` in the text of another error, a thread
that cannot be started.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from dmtd_runtime.errors import BackendError
from dmtd_runtime.machine.hardware import memory_bytes

_WORDS = re.compile(
    r"bad_alloc|bad allocation|cannot allocate|failed to allocate|failed to map segment|can't start new thread",
    re.IGNORECASE,
)


def memory_left() -> int | None:
    """Bytes that can be had: of the machine, of the cgroup, of the process's address space. None where nothing says."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    found = [] if limit == resource.RLIM_INFINITY else [max(0, limit - _address_space())]
    available = memory_bytes()[1]
    return min(found if available is None else [*found, available], default=None)


def return_freed_memory() -> bool:
    """Give back to the system what the C library keeps of freed memory; whether there was any. Other libraries than glibc: False.

    What opening a bundle needs for a moment, such as weights in another order, stays the process's own without this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if _WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def left_in_words() -> str:
    """``1.23 GB are left``."""
    left = memory_left()
    return "the system has no more" if left is None else f"{_size(left)} are left"


@contextlib.contextmanager
def one_line_memory(needed: Mapping[str, int], hint: str) -> Iterator[None]:
    """Turn what says that memory ran out into a BackendError with bytes needed and bytes left.

    Args:
        needed: bytes by what they are for, in the words of the message.
        hint: how the user needs less.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        parts = ", ".join(f"{what} {_size(count)}" for what, count in needed.items())
        raise BackendError(
            f"not enough memory: {_size(sum(needed.values()))} needed besides the libraries ({parts}), {left_in_words()}; {hint}"
        ) from error


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0
