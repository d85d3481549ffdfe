"""How long work tells how far it is: one kind of call for every verb. No display stands here."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (stage, done, total); total 0: its length is not known


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
    del stage, done, total


def counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Begin a stage; what comes back is called with how much more of it is done."""
    done = 0
    progress(stage, 0, total)

    def add(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, done, total)

    return add
