"""The process of the `dmtd` command: its three streams and its signals, before any verb and after all.

1. A closed stream keeps its number, so that no file of a verb takes it: reading finds the end, writing to stdout fails in words.
2. What the terminal's encoding cannot write comes out as question marks; ``--json`` is ASCII and loses nothing.
3. SIGTERM and SIGHUP unwind as Ctrl-C does, so that work directories go; whoever set them otherwise (nohup) is left alone.
4. Whatever is printed last is flushed here, where a full disk is still one line.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO)


def prepare_streams() -> None:
    """Rules 1 and 2."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # To be read only, also for writers: what they say is then refused rather than lost.
            setattr(sys, name, _reopened(number, "r" if number == 0 else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _reopened(number: int, mode: str) -> io.TextIOWrapper:
    flags = os.O_RDWR if number == 2 else os.O_RDONLY
    opened = os.open(os.devnull, flags)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    return open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # type: ignore[return-value]


def unwind_on_signals() -> None:
    """Rule 3: exit code 128 + the signal's number, after every ``with`` and ``finally``."""
    for number in ENDINGS if threading.current_thread() is threading.main_thread() else ():
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _unwind)


def _unwind(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the tidying short
    with contextlib.suppress(OSError):
        os.write(2, b"terminated\n")
    raise SystemExit(128 + number)


def drop_stdout() -> None:
    """Let what is still to be written go nowhere, so that the interpreter does not fail over it once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Rule 4, also for what is printed outside the verbs: ``--help``, ``--version``."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        drop_stdout()
        with contextlib.suppress(OSError):
            os.write(2, f"error: stdout cannot be written ({error.strerror}); mend that and try again\n".encode())
        raise SystemExit(1) from None
