"""Directories that appear whole or not at all: written beside their place, then exchanged in one step.

The work lies in ``.{name}.partial-XXXXXXXX`` beside the target, which its process holds locked: a work directory that is
not locked was left by a process that died, and the next call removes it. The lock, unlike a process id, also tells the
truth across containers that share the file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
NEW, OLD = "new", "old"  # inside the work directory: what is being written, and the old target on its way out


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory; when the block ends well it takes the place of ``target``, a directory or nothing.

    If the block raises, or the process dies, ``target`` is as it was; what a dead process left behind is removed by the
    next call. A symbolic link to a directory stays, and the directory it names is replaced. Of several calls for one
    target at a time, the last to end wins.

    Raises:
        OSError: the place cannot be written; ``target`` is as it was.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_directory(target) as work:
        new = work / NEW
        new.mkdir()
        yield new
        _sync(new)
        _place(new, target, work / OLD)
        _sync_one(target.parent)


@contextlib.contextmanager
def work_directory(target: Path) -> Iterator[Path]:
    """An empty directory beside ``target`` that is gone afterwards; what dead processes left there goes first."""
    _remove_leftovers(target)
    work, lock = _locked_directory(target)
    try:
        yield work
    finally:
        _restore(work, target)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _restore(work: Path, target: Path) -> None:
    """Put the old target back if whatever ended the call (Ctrl-C, an error) caught it on its way out."""
    if (work / OLD).is_dir() and not target.exists():
        (work / OLD).rename(target)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _locked_directory(target: Path) -> tuple[Path, int]:
    """A new directory beside ``target`` and the descriptor that holds its lock."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        # Between its making and its locking another call may take it for a leftover and remove it.
        try:
            descriptor = os.open(work, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks; then nothing is ever taken for a leftover
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if work.exists():
            return work, descriptor
        os.close(descriptor)


def remove_all_leftovers(parent: Path) -> None:
    """Remove what dead processes left in ``parent``, whatever their targets were."""
    for work in list(parent.glob(".*.partial-*")):
        name = work.name[1:].rpartition(".partial-")[0]
        _remove_leftovers(parent / name)


def _remove_leftovers(target: Path) -> None:
    """Remove work directories that no process holds; the old target goes back first if it was on its way out."""
    for work in target.parent.glob(_glob_escape(_prefix(target)) + "*"):
        try:
            descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _restore(work, target)
            shutil.rmtree(work, ignore_errors=True)
        except OSError:
            continue  # at work in another process
        finally:
            os.close(descriptor)


def _glob_escape(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(new: Path, target: Path, aside: Path) -> None:
    """Put ``new`` in the place of ``target``: in one system call where kernel and file system can, else by two renames."""
    if not target.exists():
        try:
            new.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # then another call was quicker
                raise
        else:
            return
    if _exchange(new, target):
        return
    target.rename(aside)
    new.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where that does not exist."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return result == 0
