"""A directory that one process works in at a time: two runs that write the same files would spoil them both, unseen.

Stands under ``job`` (a run's states) and ``features`` (stored features that several runs may share). The claim is a lock of
the operating system on the directory itself: it leaves no file, and goes with the process however that ends. No torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dmtd_models.errors import ModelError


@contextlib.contextmanager
def claimed(directory: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold a directory, which must be there, while the block runs. Where the system has no such locks, nothing is held.

    Args:
        directory: to hold.
        what: it is for, as the error's first words.
        remedy: what to do where another process holds it, as the error's last.

    Raises:
        ModelError: another process holds it.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ModelError(f"{what}: another process is at work in {directory}; {remedy}") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
