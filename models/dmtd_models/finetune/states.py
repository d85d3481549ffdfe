"""Where a run goes on from: the directories ``checkpoint-<step>`` of its saved states, whole or not.

A state is whole once its ``complete.json`` stands, which is written last and removed first, and while its files have the
sizes that stand there: a machine that goes down may leave empty ones. No torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

COMPLETE = "complete.json"
SIZES = "bytes"
"""Where complete.json has the sizes of files by name."""
_EACH_PROCESS = "rng_state"
"""Begin of the names of files that other processes may still be writing; a run goes on without them."""


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


def file_sizes(state: Path) -> dict[str, int]:
    """Bytes of a state's files, for its record."""
    files = [file for file in state.iterdir() if file.is_file() and not file.name.startswith((_EACH_PROCESS, "."))]
    return {file.name: file.stat().st_size for file in files if file.name != COMPLETE}


def _whole(directory: Path) -> list[Path]:
    found = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}") if step_of(path.parent) >= 0]
    return [state for state in found if _as_recorded(state)]


def _as_recorded(state: Path) -> bool:
    try:
        record = json.loads((state / COMPLETE).read_text(encoding="utf-8"))
        return file_sizes(state).items() >= record.get(SIZES, {}).items()
    except (OSError, ValueError, AttributeError):
        return False


def step_of(state: Path) -> int:
    """The step after which a state was saved; -1 for a directory that is none."""
    number = state.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
