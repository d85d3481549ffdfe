"""Calls into native libraries: a panic of one written in Rust becomes an exception that ``except Exception`` sees.

PyO3 raises a panic as a ``BaseException`` that cannot be imported, after Rust has written its own report to stderr. The
report is held back: the caller tells the user in one line what was wrong with the file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

__all__ = ["NativePanicError", "call_native"]

T = TypeVar("T")
_PANIC_MODULE = "pyo3_runtime"
_held = threading.Lock()


class NativePanicError(RuntimeError):
    """A native library gave up; the message is its own."""


def call_native(function: Callable[..., T], *args: Any, quiet: bool = False, **kwargs: Any) -> T:
    """Call a function of a native library.

    Args:
        function: what to call.
        *args: its arguments.
        quiet: hold stderr back meanwhile, and drop what was written if the library panics. For opening files: it costs
            a few system calls, and lines of other threads wait for its end.
        **kwargs: its arguments by name.

    Raises:
        NativePanicError: the library panicked. Whatever else it raises passes.
    """
    try:
        with _held_stderr() if quiet else contextlib.nullcontext():
            return function(*args, **kwargs)
    except BaseException as error:
        if type(error).__module__ != _PANIC_MODULE:
            raise
        raise NativePanicError(" ".join(str(error).split()) or "it panicked") from error


@contextlib.contextmanager
def _held_stderr() -> Iterator[None]:
    """Keep what is written to the process's stderr, and write it afterwards unless the block panics."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_held)
            kept = stack.enter_context(tempfile.TemporaryFile())
            own = os.dup(2)
        except OSError:  # no stderr, or no place for it: then nothing is held
            yield
            return
        stack.callback(os.close, own)
        os.dup2(kept.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = type(error).__module__ == _PANIC_MODULE
            raise
        finally:
            os.dup2(own, 2)
            kept.seek(0)
            if not panicked and (text := kept.read()):
                with contextlib.suppress(OSError):
                    os.write(2, text)
