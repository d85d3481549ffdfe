"""A library's progress callbacks as plain calls: one stage for each engine, steps of its top phase, and a way to stop it.

The callbacks come from threads of the library. A build is stopped by answering False, which is how Ctrl-C ends it cleanly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Steps:
    """Counts steps of all phases under one lock; ``cancelled`` set from anywhere ends the build at its next step."""

    def __init__(self, on_steps: Callable[[int, int], None]) -> None:
        self._on_steps = on_steps
        self._lock = threading.Lock()
        self._open: dict[str, tuple[int, int]] = {}  # phase -> steps done, steps
        self._done = self._total = 0
        self.cancelled = threading.Event()

    def start(self, phase: str, steps: int) -> None:
        with self._lock:
            self._open[phase] = (0, steps)
            self._total += steps
            self._on_steps(self._done, self._total)

    def step(self, phase: str, step: int) -> bool:
        """``step`` (from 0) of ``phase`` is done; False to stop."""
        with self._lock:
            before, steps = self._open.get(phase, (0, 0))
            now = min(steps, max(before, step + 1))
            self._open[phase] = (now, steps)
            self._done += now - before
            self._on_steps(self._done, self._total)
        return not self.cancelled.is_set()

    def finish(self, phase: str) -> None:
        with self._lock:
            done, steps = self._open.pop(phase, (0, 0))
            self._done += steps - done
            self._on_steps(self._done, self._total)


def make_monitor(module: Any, steps: Steps) -> Any:
    """An IProgressMonitor of the library that tells ``steps``."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return steps.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            steps.finish(phase_name)

    return Monitor()
