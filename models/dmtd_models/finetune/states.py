"""Where a run goes on from: the directories ``checkpoint-<step>`` of its saved states, whole or not.

A state is whole once its ``complete.json`` stands, which is written last and removed first. No torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

COMPLETE = "complete.json"


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest state that was written whole."""
    return max(_whole(directory), key=step_of, default=None)


def remove_states(directory: Path, *, keep: int) -> None:
    """Remove all but the newest ``keep`` whole states, and what was left half written."""
    kept = sorted(_whole(directory), key=step_of)[-keep:]
    for state in directory.glob("checkpoint-*"):
        if state.is_dir() and state not in kept and state.name.rpartition("-")[2].isdigit():
            (state / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(state, ignore_errors=True)


def _whole(directory: Path) -> list[Path]:
    return [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}") if step_of(path.parent) >= 0]


def step_of(state: Path) -> int:
    """The step after which a state was saved; -1 for a directory that is none."""
    number = state.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
