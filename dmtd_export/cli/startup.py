"""Ctrl-C while the command's own modules are loaded: the process ends at once. No imports but the standard library's."""

from __future__ import annotations

import os
import signal

EXIT_INTERRUPTED = 130


def leave_on_ctrl_c() -> None:
    """Until :func:`unwind_on_ctrl_c`. Nothing has been begun, and an exception would surface inside some import."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def unwind_on_ctrl_c() -> None:
    """From here on a ``KeyboardInterrupt``, as usual."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)
