"""Stages of a long verb on stderr: bars on a terminal, otherwise a line for each stage, and now and then how far it is."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from dmtd_runtime.cli.common import error_console

QUIET_S = 10.0  # between two lines of a stage


class StageDisplay:
    """Shows one stage after another; a context manager."""

    def __init__(self) -> None:
        console = error_console()
        self._console = console
        self._quiet = not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=40),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=self._quiet,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._told = 0.0  # when the last line was written
        self._shown = 0  # how much of the stage it said was done

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._bar.stop()

    def stage(self, name: str, total: int) -> None:
        """A stage begins; ``total`` 0: its length is not known. Verification names its own parts (:meth:`verified`)."""
        if name == "verify":
            return
        self._finish()
        self._name, self._shown = name, 0
        if self._quiet:
            self._tell(f"{name} ...")
        else:
            self._task = self._bar.add_task(name, total=total or None)

    def verified(self, name: str, done: int, total: int) -> None:
        """A part of verification: ``done`` of ``total`` steps."""
        self.counted(f"verify: {name}", done, total)

    def counted(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of a stage, which begins with the first."""
        if name != self._name:
            self.stage(name, total)
        elif self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None)
        elif self._quiet and total and done != self._shown and self._is_due(done == total):
            self._tell(f"{name}: {done} of {total}")
            self._shown = done

    def line(self, text: str) -> None:
        """One line that stays above the bars."""
        self._console.print(text, markup=False)

    def _is_due(self, ended: bool) -> bool:
        """Whether to tell how far a stage is: now and then, and of one that was told of that it has ended."""
        return time.monotonic() - self._told > QUIET_S or (ended and self._shown > 0)

    def _tell(self, text: str) -> None:
        self.line(text)
        self._told = time.monotonic()

    def _finish(self) -> None:
        if self._task is None:
            return
        task = self._bar.tasks[self._bar.task_ids.index(self._task)]
        if task.total is None:
            self._bar.update(self._task, total=1, completed=1)
        else:
            self._bar.update(self._task, completed=task.total)
        self._task = None
