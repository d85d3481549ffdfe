"""A backend lent to who would close it, with a clock: the benchmark runs many loops and workers over one open backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from dmtd_runtime.backends.base import Array, Backend, Rows, RunOutput, SlotCycle, SlotStep

P = ParamSpec("P")
T = TypeVar("T")


class LentBackend:
    """Does all that the backend does, but closing. See :class:`dmtd_runtime.backends.base.Backend`.

    ``seconds``: spent in runs so far: in sessions, in filling their inputs and in choosing tokens.
    """

    def __init__(self, backend: Backend) -> None:
        self.slots, self.capacity, self.max_rows = backend.slots, backend.capacity, backend.max_rows
        self.stats, self.max_model_len, self.full_pass = backend.stats, backend.max_model_len, backend.full_pass
        self.runs_cycles, self.runs_ahead = backend.runs_cycles, backend.runs_ahead
        self.gives_all_rows = backend.gives_all_rows
        self.seconds = 0.0
        self._backend = backend

    def _timed(self, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - start

    def run(
        self, steps: Sequence[SlotStep], committed: Sequence[int], *, choose: bool = False, rows: Rows = "last"
    ) -> RunOutput:
        return self._timed(self._backend.run, steps, committed, choose=choose, rows=rows)

    def warm_up(self) -> None:
        self._backend.warm_up()
        self.stats = self._backend.stats

    def start_cycle(self, slots: Sequence[SlotCycle], committed: Sequence[int], *, follows: bool = False) -> None:
        self._timed(self._backend.start_cycle, slots, committed, follows=follows)

    def finish_cycle(self) -> RunOutput:
        return self._timed(self._backend.finish_cycle)

    def clear(self, slot: int, rows: int) -> None:
        self._backend.clear(slot, rows)

    def move(self, source: int, target: int, rows: int) -> None:
        self._backend.move(source, target, rows)

    def read_rows(self, slot: int, rows: range) -> list[Array]:
        return self._backend.read_rows(slot, rows)

    def write_rows(self, slot: int, first: int, values: Array) -> None:
        self._backend.write_rows(slot, first, values)

    def close(self) -> None:
        """Whoever opened the backend closes it."""
