"""The worker: one thread that owns the backend, takes sequences as they come and runs them to their ends.

Life of a request: LLM.submit -> waiting list -> the loop's scheduler -> events to the request -> finished. Callers never
touch the backend, and only the worker's thread tells a sequence anything: cancelling sets a flag, which that thread sees
between two steps, for running and waiting sequences alike, as it sees deadlines. (So a flag may be set from anywhere, a
finalizer in the middle of a garbage collection included.) A failure of the backend ends every request with that error, and
the worker takes no more.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence

from dmtd_runtime.backends.base import Backend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import AbortedError, BackendError, DmtdError
from dmtd_runtime.serving.loop import Loop
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

logger = logging.getLogger("dmtd.worker")

JOIN_SECONDS = 60.0


class Worker:
    """Runs sequences on one backend in a thread of its own. All methods may be called from any thread.

    ``warm_up``: the backend warms up before this returns, in that thread, because ONNX Runtime keeps captured graphs and its
    handles to CUDA's libraries for each thread. What fails in it is raised, and the backend closed.
    """

    def __init__(self, backend: Backend, plan: CyclePlan, *, warm_up: bool = False) -> None:
        self._backend = backend
        self._changed = threading.Condition()
        self._closing = False
        self._loop = Loop(backend, plan, closing=self.is_closing)
        self._incoming: deque[SequenceRun] = deque()
        self._process = os.getpid()
        self._failure: DmtdError | None = None
        self._is_warm = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(warm_up,), name="dmtd-worker", daemon=True)
        try:
            self._thread.start()
            self._is_warm.wait()
        except BaseException:
            self.close()
            raise
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def submit(self, sequences: Sequence[SequenceRun]) -> None:
        """Queue sequences. Raises AbortedError after close, BackendError after a failure."""
        with self._changed:
            if self._failure is not None:
                raise BackendError(f"the worker stopped earlier: {self._failure}; open the bundle again")
            if os.getpid() != self._process:
                raise AbortedError("the worker belongs to the process that opened it; open the bundle after forking")
            if self._closing or not self._thread.is_alive():
                raise AbortedError("the worker is closed; open the bundle again")
            self._incoming.extend(sequences)
            self._changed.notify_all()

    def close(self) -> None:
        """End all requests with ``abort``, stop the thread and free the backend. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_SECONDS)

    def _work(self, warm_up: bool) -> None:
        try:
            if warm_up:
                self._backend.warm_up()
            self._is_warm.set()
            while self._wait_for_work():
                self._loop.step()
        except DmtdError as error:
            self._fail(error)
        except BaseException as error:  # a panic of a native library is no Exception, and callers wait for an answer
            logger.exception("the worker failed")
            self._fail(BackendError(f"the worker failed: {type(error).__name__}: {error}"))
        finally:
            self._is_warm.set()
            for sequence in (*self._loop.sequences, *self._incoming):
                if not sequence.ended and not sequence.end_from_outside():
                    sequence.tell(TokenEvent(choice=None, finish_reason="abort"))
            self._incoming.clear()
            self._backend.close()

    def _wait_for_work(self) -> bool:
        """Hand what came in to the loop, and wait while it has nothing; False once the worker closes and nothing runs."""
        with self._changed:
            while not self._incoming and not self._loop.sequences and not self._closing:
                self._changed.wait()
            while self._incoming:
                self._loop.add(self._incoming.popleft())
            return bool(self._loop.sequences)

    def is_closing(self) -> bool:
        """Whether running sequences should end."""
        return self._closing

    def _fail(self, error: DmtdError) -> None:
        with self._changed:
            self._failure = error
            left = [*self._loop.sequences, *self._incoming]
            self._incoming.clear()
        for sequence in left:
            if not sequence.ended:
                sequence.tell(TokenEvent(choice=None, error=error))
