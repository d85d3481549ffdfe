"""The engine: one thread that owns the backend, takes waiting sequences as static batches and runs them to their ends.

Life of a request: LLM.submit -> waiting list -> batch of up to ``backend.slots`` sequences -> run_batch -> events to the
request -> finished. Callers never touch the backend. Cancelling and deadlines act between steps; a request that still waits
ends at once when it is cancelled, and between two steps of the running batch when its time is over. A failure of the
backend ends every request with that error, and the engine takes no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from dmtd_runtime.backends.base import Backend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import AbortedError, BackendError, DmtdError
from dmtd_runtime.generate import FinishReason, SequenceRun, TokenEvent, run_batch

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
        self._failure: DmtdError | None = None
        self._thread = threading.Thread(target=self._work, name="dmtd-engine", daemon=True)
        self._thread.start()

    def submit(self, sequences: Sequence[SequenceRun]) -> None:
        """Queue sequences. Raises AbortedError after close, BackendError after a failure."""
        with self._changed:
            if self._failure is not None:
                raise BackendError(f"the engine stopped earlier: {self._failure}; open the bundle again")
            if self._closing:
                raise AbortedError("the engine is closed; open the bundle again")
            self._waiting.extend(sequences)
            self._changed.notify_all()

    def drop_waiting(self, wanted: Callable[[SequenceRun], bool], reason: FinishReason) -> None:
        """End the sequences that still wait and that ``wanted`` picks; running ones see their own cancel flag."""
        with self._changed:
            dropped = [sequence for sequence in self._waiting if wanted(sequence)]
            self._waiting = deque(sequence for sequence in self._waiting if sequence not in dropped)
        for sequence in dropped:
            sequence.tell(TokenEvent(choice=None, finish_reason=reason))

    def close(self) -> None:
        """End all requests with ``abort``, stop the thread and free the backend. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.drop_waiting(lambda _: True, "abort")
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                run_batch(self._backend, self._plan, batch, between_steps=self._drop_late)
                self._running = []
                del batch
        except DmtdError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("the engine failed")
            self._fail(BackendError(f"the engine failed: {type(error).__name__}: {error}"))
        finally:
            self._backend.close()

    def _drop_late(self) -> None:
        """End what still waits and has no time left."""
        if self._waiting:
            self.drop_waiting(SequenceRun.is_late, "deadline")

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
