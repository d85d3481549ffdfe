"""Files that stand for others: a clone without Git LFS has pointers of some 130 bytes in the place of weights."""

from __future__ import annotations

from pathlib import Path

__all__ = ["lfs_pointer"]

_FIRST_LINE = b"version https://git-lfs.github.com/spec/v1\n"


def lfs_pointer(path: Path) -> str | None:
    """What is wrong with a file that is a Git LFS pointer, and how to mend it; None for any other, or none at all."""
    try:
        with path.open("rb") as file:
            found = file.read(len(_FIRST_LINE)) == _FIRST_LINE
    except OSError:
        return None
    return "got a Git LFS pointer, expected the file it stands for; fetch that with: git lfs pull" if found else None
