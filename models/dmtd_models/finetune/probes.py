"""What evaluation asks, to be kept out of a run's text: the items of every local task that can be had here.

Stands between ``dmtd_models.data``, which has tasks and the search, and ``job``. A task whose package is neither in the cache nor
to be downloaded is left out and named: a run must not fail for want of a network. A run that goes on looks for the tasks that it
began with, so that its documents stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmtd_models.data.errors import DataError, PackageError
from dmtd_models.data.facts import everyday_prompts
from dmtd_models.data.overlap import Probe, probes_of, prompt_probes
from dmtd_models.data.packages import Package
from dmtd_models.data.tasks import GYM_PREFIX, load_task, package_of, task_names
from dmtd_models.finetune.record import RECORD
from dmtd_models.finetune.states import latest_checkpoint

EVERYDAY = "everyday"
PROBED = "probed"
"""Where a run's record names the tasks."""
_BEFORE_RECORDED = ("facts", EVERYDAY)
"""What runs kept out when their record did not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProbes:
    """Items to look for in training text."""

    probes: tuple[Probe, ...]
    tasks: tuple[str, ...]  # whose items these are
    missing: tuple[str, ...]  # tasks that cannot be had here

    @property
    def notes(self) -> tuple[str, ...]:
        """A line about what is looked for, and one about what is not."""
        lines = [f"evaluation items looked for: {_shortly(self.tasks)}"]
        if self.missing:
            lines.append(
                f"not looked for, as their packages cannot be had here: {_shortly(self.missing)}; do not evaluate on them, "
                "or run where they can be downloaded"
            )
        return tuple(lines)


def evaluation_probes(cache_dir: Path, tasks: Sequence[str] | None = None) -> EvaluationProbes:
    """The items of tasks, packages being downloaded if they are not in the cache.

    Args:
        cache_dir: of packages.
        tasks: names of tasks; all that there are by default.
    """
    probes: list[Probe] = []
    found: list[str] = []
    missing: list[str] = []
    unavailable: set[Package] = set()  # each is tried once: without a network that takes a while
    for name in (EVERYDAY, *task_names()) if tasks is None else tasks:
        if name == EVERYDAY:
            probes += prompt_probes(EVERYDAY, everyday_prompts())
            found.append(name)
            continue
        package = package_of(name)
        if package in unavailable:
            missing.append(name)
            continue
        try:
            probes += probes_of(load_task(name, cache_dir, allow_code_execution=True))  # items are read, nothing runs
            found.append(name)
        except (PackageError, DataError):
            missing.append(name)
            if package is not None:
                unavailable.add(package)
    return EvaluationProbes(probes=tuple(probes), tasks=tuple(found), missing=tuple(missing))


def probed_before(training: Path) -> tuple[str, ...] | None:
    """The tasks whose items were kept out of the run that has states in ``training``; None: there is no such run."""
    if latest_checkpoint(training) is None:
        return None
    try:
        record = json.loads((training / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the record's own check says what is wrong with it
    return tuple(record.get(PROBED, _BEFORE_RECORDED)) if isinstance(record, dict) else None


def _shortly(names: Sequence[str]) -> str:
    """The names, the many of reasoning-gym as one."""
    plain = [name for name in names if not name.startswith(GYM_PREFIX)]
    made = len(names) - len(plain)
    return ", ".join([*plain, *([f"{made} of {GYM_PREFIX}*"] if made else [])])
