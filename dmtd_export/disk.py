"""What the file system has no room for, or refuses, told in one line. For whatever writes a directory beside its place."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from dmtd_export.errors import ExportError


def existing_parent(directory: Path) -> Path:
    """The nearest directory above that is there: the rest is made with what is written."""
    return next(place for place in directory.resolve().parents if place.exists())


def check_room(directory: Path, needed_bytes: int, *, what: str, remedy: str) -> None:
    """Refuse to start what would not fit.

    Args:
        directory: what is to be written.
        needed_bytes: how large it becomes.
        what: subject and verb of the message: "the bundle needs".
        remedy: how the user comes by room.

    Raises:
        ExportError: with the bytes free and needed.
    """
    place = existing_parent(directory)
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise ExportError(f"{place} has {free / 1e9:.2f} GB free, {what} {needed_bytes / 1e9:.2f} GB; {remedy}")


@contextlib.contextmanager
def one_line_disk_errors(directory: Path, *, again: str, remedy: str) -> Iterator[None]:
    """Turn what the file system refuses into an ExportError that says what became of ``directory``.

    Args:
        directory: what is written.
        again: what to do once there is room: "export again".
        remedy: what to do about anything else, as :func:`refused` takes it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"no space left while writing {directory}: free some and {again}; nothing was kept"
            ) from error
        if error.errno is None or error.errno == errno.ENOMEM:  # the latter is no fault of the place
            raise
        raise refused(error.filename or directory, error.strerror or str(error), remedy) from error


def refused(place: object, fault: str, remedy: str) -> ExportError:
    """That a place cannot be written; ``remedy`` follows "mend that"."""
    return ExportError(f"{place}: {fault}; mend that{remedy}; nothing was kept")
