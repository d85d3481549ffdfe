"""The worker: one thread that owns the backend, takes sequences as they come and runs them to their ends.

Life of a request: Service -> ``submit`` -> the loop's scheduler -> events to the request -> finished. Callers never touch the
backend, and only the worker's thread tells a sequence anything: cancelling sets a flag, which that thread sees between two
steps, for running and waiting sequences alike, as it sees deadlines. (So a flag may be set from anywhere, a finalizer in the
middle of a garbage collection included.) A failure of the backend ends every request with that error, and the worker takes no
more.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from dmtd_runtime.backends.base import Backend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import AbortedError, BackendError, DmtdError, QueueFullError, RequestError
from dmtd_runtime.serving.counts import Counts
from dmtd_runtime.serving.loop import Loop
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

logger = logging.getLogger("dmtd.worker")

JOIN_SECONDS = 60.0


class Worker:
    """Runs sequences on one backend in a thread of its own. All methods may be called from any thread.

    ``options``: what bounds its passes, its queue and its prefix cache.

    ``warm_up``: the backend warms up before this returns, in that thread, because ONNX Runtime keeps captured graphs and its
    handles to CUDA's libraries for each thread. What fails in it is raised, and the backend closed.

    ``after_step``: called by that thread when sequences may have been told something, once a step, and a last time at the end.
    It must not raise.
    """

    def __init__(
        self,
        backend: Backend,
        plan: CyclePlan,
        *,
        options: ServingOptions = ServingOptions(),
        warm_up: bool = False,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._backend, self._options, self._after_step = backend, options, after_step
        self._changed = threading.Condition()
        self._closing = False
        self._loop = Loop(backend, plan, options=options, closing=self.is_closing, arriving=self._between_cycles)
        self._incoming: list[SequenceRun] = []
        self._incoming_tokens = 0
        self._open: list[SequenceRun] = []  # where the queue is bounded: all that may not have ended
        self._counts = self._snapshot = self._loop.counts()
        self._process = os.getpid()
        self.failure: DmtdError | None = None  # what ended it
        self._is_warm = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(warm_up,), name="dmtd-worker", daemon=True)
        try:
            self._thread.start()
            self._is_warm.wait()
        except BaseException:
            self.close()
            raise
        if self.failure is not None:
            self._thread.join()
            raise self.failure

    def submit(self, sequences: Sequence[SequenceRun]) -> None:
        """Queue sequences, all or none.

        Raises:
            QueueFullError: more would wait than the options allow.
            RequestError: so many at once that they would never be taken.
            AbortedError: after close, or in a process that was forked after opening.
            BackendError: after a failure.
        """
        if os.getpid() != self._process:  # before the lock, which somebody may have held when the process was forked
            raise AbortedError("the worker belongs to the process that opened it; open the bundle after forking")
        with self._changed:
            if self.failure is not None:
                raise BackendError(f"the worker stopped earlier: {self.failure}; open the bundle again")
            if self._closing or not self._thread.is_alive():
                raise AbortedError("the worker is closed; open the bundle again")
            self._refuse_beyond_bounds(sequences)
            self._incoming.extend(sequences)
            self._incoming_tokens += sum(len(sequence.ids) for sequence in sequences)
            self._publish()
            self._changed.notify_all()

    def snapshot(self) -> Counts:
        """What it does and has done as of its last step, and what has come in since. Takes no lock."""
        return self._snapshot

    def close(self) -> None:
        """End all requests with ``abort``, stop the thread and free the backend. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_SECONDS)

    def is_closing(self) -> bool:
        """Whether running sequences should end."""
        return self._closing

    def _refuse_beyond_bounds(self, sequences: Sequence[SequenceRun]) -> None:
        """Raise if too much would wait. Sequences that a slot is free for do not wait."""
        most, most_tokens = self._options.max_num_queued_reqs, self._options.max_num_queued_tokens
        if most is None and most_tokens is None:
            return
        if most is not None and len(sequences) > self._backend.slots + most:
            raise RequestError(
                f"got {len(sequences)} sequences at once, expected at most {self._backend.slots + most}, which is max_num_seqs "
                "and max_num_queued_reqs together; ask for fewer at a time"
            )
        self._open = [sequence for sequence in self._open if not sequence.ended]
        waiting = [sequence for sequence in self._open if sequence.started is None]
        free = self._backend.slots - (len(self._open) - len(waiting))
        queued = [*waiting, *sequences][free:]
        tokens = sum(len(sequence.ids) for sequence in queued)
        if (most is not None and len(queued) > most) or (most_tokens is not None and tokens > most_tokens):
            raise QueueFullError(
                f"the queue is full: got {len(queued)} waiting sequences with {tokens} prompt tokens, expected at most "
                f"{_bound(most)} (max_num_queued_reqs) with {_bound(most_tokens)} (max_num_queued_tokens); try again later"
            )
        self._open += sequences

    def _publish(self) -> None:
        counts = self._counts
        if self._incoming:
            counts = replace(
                counts,
                waiting=counts.waiting + len(self._incoming),
                waiting_prompt_tokens=counts.waiting_prompt_tokens + self._incoming_tokens,
            )
        self._snapshot = counts

    def _work(self, warm_up: bool) -> None:
        try:
            if warm_up:
                self._backend.warm_up()
            self._is_warm.set()
            while self._wait_for_work():
                self._loop.step()
                self._tell()
        except DmtdError as error:
            self._fail(error)
        except BaseException as error:  # a panic of a native library is no Exception, and callers wait for an answer
            logger.exception("the worker failed")
            self._fail(BackendError(f"the worker failed: {type(error).__name__}: {error}"))
        finally:
            self._is_warm.set()
            self._end_what_is_left()
            self._backend.close()

    def _wait_for_work(self) -> bool:
        """Hand what came in to the loop, and wait while it has nothing; False once the worker closes and nothing runs."""
        with self._changed:
            while True:
                if self._incoming:
                    for sequence in self._incoming:
                        self._loop.add(sequence)
                    self._incoming.clear()
                    self._incoming_tokens = 0
                    self._counts = self._loop.counts()
                    self._publish()
                if self._loop.sequences or self._closing:
                    return bool(self._loop.sequences)
                self._changed.wait()

    def _between_cycles(self) -> bool:
        """The loop asks, in the middle of a step of several cycles, whether somebody has come."""
        self._tell()
        return bool(self._incoming)

    def _tell(self) -> None:
        """Publish what has been done, then wake who waits for it."""
        with self._changed:
            self._counts = self._loop.counts()
            self._publish()
        self._after_step()

    def _fail(self, error: DmtdError) -> None:
        with self._changed:
            self.failure = error
        for sequence in self._take_what_is_left():
            sequence.tell(TokenEvent(choice=None, error=error))

    def _end_what_is_left(self) -> None:
        for sequence in self._take_what_is_left():
            if not sequence.end_from_outside():
                sequence.tell(TokenEvent(choice=None, finish_reason="abort"))
        with self._changed:
            self._snapshot = replace(self._snapshot, running=0, waiting=0, waiting_prompt_tokens=0, kv_rows=0)
        self._after_step()

    def _take_what_is_left(self) -> list[SequenceRun]:
        with self._changed:
            left = [*self._loop.sequences, *self._incoming]
            self._incoming.clear()
            self._incoming_tokens = 0
        return [sequence for sequence in left if not sequence.ended]


def _bound(count: int | None) -> str:
    return "any number" if count is None else str(count)
