"""The worker: one thread that owns the backend, takes waiting sequences as static batches and runs them to their ends.

Life of a request: LLM.submit -> waiting list -> batch of up to ``backend.slots`` sequences -> run_batch -> events to the
request -> finished. Callers never touch the backend, and only the worker's thread tells a sequence anything: cancelling sets
a flag, which that thread sees between two steps, for running and waiting sequences alike, as it sees deadlines. (So a flag
may be set from anywhere, a finalizer in the middle of a garbage collection included.) A failure of the backend ends every
request with that error, and the worker takes no more.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence

from dmtd_runtime.backends.base import Backend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import AbortedError, BackendError, DmtdError
from dmtd_runtime.serving.loop import SequenceRun, TokenEvent, run_batch

logger = logging.getLogger("dmtd.engine")

JOIN_SECONDS = 60.0


class Engine:
    """Runs sequences on one backend in a thread of its own. All methods may be called from any thread."""

    def __init__(self, backend: Backend, plan: CyclePlan) -> None:
        self._backend = backend
        self._plan = plan
        self._changed = threading.Condition()
        self._waiting: deque[SequenceRun] = deque()
        self._running: list[SequenceRun] = []
        self._closing = False
        self._process = os.getpid()
        self._failure: DmtdError | None = None
        self._thread = threading.Thread(target=self._work, name="dmtd-engine", daemon=True)
        self._thread.start()

    def submit(self, sequences: Sequence[SequenceRun]) -> None:
        """Queue sequences. Raises AbortedError after close, BackendError after a failure."""
        with self._changed:
            if self._failure is not None:
                raise BackendError(f"the engine stopped earlier: {self._failure}; open the bundle again")
            if os.getpid() != self._process:
                raise AbortedError("the engine belongs to the process that opened it; open the bundle after forking")
            if self._closing or not self._thread.is_alive():
                raise AbortedError("the engine is closed; open the bundle again")
            self._waiting.extend(sequences)
            self._changed.notify_all()

    def close(self) -> None:
        """End all requests with ``abort``, stop the thread and free the backend. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                run_batch(self._backend, self._plan, batch, between_steps=self._end_waiting)
                self._running = []
                del batch
        except DmtdError as error:
            self._fail(error)
        except BaseException as error:  # a panic of a native library is no Exception, and callers wait for an answer
            logger.exception("the engine failed")
            self._fail(BackendError(f"the engine failed: {type(error).__name__}: {error}"))
        finally:
            for sequence in self._waiting:
                if not sequence.end_from_outside():
                    sequence.tell(TokenEvent(choice=None, finish_reason="abort"))
            self._waiting.clear()
            self._backend.close()

    def _end_waiting(self) -> None:
        """End what still waits and was cancelled, has no time left, or finds the engine closing."""
        if not self._waiting:
            return
        with self._changed:
            waiting = list(self._waiting)
        ended = [sequence for sequence in waiting if sequence.end_from_outside()]
        with self._changed:
            for sequence in ended:
                self._waiting.remove(sequence)

    def _next_batch(self) -> list[SequenceRun]:
        """Wait for work; [] when the engine closes."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing:
                return []
            count = min(len(self._waiting), self._backend.slots)
            self._running = [self._waiting.popleft() for _ in range(count)]
            for sequence in self._running:
                sequence.started = time.monotonic()
            return self._running

    def is_closing(self) -> bool:
        """Whether running sequences should end."""
        return self._closing

    def _fail(self, error: DmtdError) -> None:
        with self._changed:
            self._failure = error
            left = [*self._running, *self._waiting]
            self._waiting.clear()
        for sequence in left:
            if not sequence.ended:
                sequence.tell(TokenEvent(choice=None, error=error))
