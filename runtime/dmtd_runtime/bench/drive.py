"""One load against one worker, as clients would bring it, and what every sequence was told when. Judges nothing.

The caller's thread is all clients at once: it submits, sleeps until the next arrival, and in a closed loop submits the next
sequence whenever one has ended. Times are noted by the worker's thread, where serving would hand a token on.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dmtd_runtime.backends.base import Backend, RunStats
from dmtd_runtime.bench.lent import LentBackend
from dmtd_runtime.bench.load import LoadRequest
from dmtd_runtime.bench.run import greedy_sequence
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import DmtdError
from dmtd_runtime.serving.counts import Counts
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent
from dmtd_runtime.serving.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRecord:
    """One sequence; times in seconds since the load began. ``full_passes`` ran over T between its first token and its last."""

    prompt_len: int
    cached_tokens: int
    submitted_s: float
    started_s: float
    token_s: tuple[float, ...]
    full_passes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """One load in one mode: its sequences in the order they came, what the worker counted, and the time in sessions
    and in the backend's runs.
    """

    cycle_length: int
    sequences: tuple[SequenceRecord, ...]
    counts: Counts
    session_seconds: float
    backend_seconds: float


@dataclass(slots=True, kw_only=True)
class _Client:
    """Notes what one sequence is told."""

    backend: Backend
    ended: queue.SimpleQueue[DmtdError | None]
    submitted_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    first_pass: int = 0
    last_pass: int = 0
    sequence: SequenceRun | None = None

    def on_event(self, event: TokenEvent) -> None:
        if event.choice is not None:
            self.last_pass = self.backend.stats.full_passes
            if not self.token_s:
                self.first_pass = self.last_pass
            self.token_s.append(time.monotonic())
        if event.error is not None or event.finish_reason is not None:
            self.ended.put(event.error)

    def record(self, start: float) -> SequenceRecord:
        sequence = self.sequence
        assert sequence is not None and sequence.started is not None, "a sequence that ended had begun"
        return SequenceRecord(
            prompt_len=len(sequence.ids) - len(self.token_s),
            cached_tokens=sequence.cached_tokens,
            submitted_s=self.submitted_s - start,
            started_s=sequence.started - start,
            token_s=tuple(at - start for at in self.token_s),
            full_passes=self.last_pass - self.first_pass,
        )


def drive(
    backend: Backend,
    plan: CyclePlan,
    requests: Sequence[LoadRequest],
    *,
    vocab_size: int,
    arrivals: Sequence[float] | None = None,
    concurrency: int | None = None,
    serving: ServingOptions = ServingOptions(),
) -> LoadRun:
    """Serve all requests, over a backend that stays open.

    Args:
        backend: nobody else uses it meanwhile.
        plan: DMTD, or plain decoding.
        requests: in the order they come.
        vocab_size: of the model.
        arrivals: seconds after the start at which each comes; None: all at once.
        concurrency: at most so many at a time, whatever ``arrivals`` say.
        serving: the worker's options.

    Raises:
        DmtdError: a sequence or the backend failed.
    """
    ended: queue.SimpleQueue[DmtdError | None] = queue.SimpleQueue()
    clients = [_Client(backend=backend, ended=ended) for _ in requests]
    at, under_way = arrivals or [0.0] * len(requests), 0
    lent = LentBackend(backend)
    worker = Worker(lent, plan, options=serving, warm_up=True)
    before = replace(backend.stats)
    try:
        start = time.monotonic()
        for client, request, due in zip(clients, requests, at, strict=True):
            if under_way == concurrency:
                _wait_for(ended)
                under_way -= 1
            time.sleep(max(0.0, start + due - time.monotonic()))
            client.sequence = greedy_sequence(request.prompt_ids, vocab_size, request.max_tokens, client.on_event)
            client.submitted_s = time.monotonic()
            worker.submit([client.sequence])
            under_way += 1
        for _ in range(under_way):
            _wait_for(ended)
    finally:
        worker.close()
    return LoadRun(
        cycle_length=plan.cycle.cycle_length,
        sequences=tuple(client.record(start) for client in clients),
        counts=_since(worker.snapshot(), before),
        session_seconds=backend.stats.session_seconds - before.session_seconds,
        backend_seconds=lent.seconds,
    )


def _since(counts: Counts, before: RunStats) -> Counts:
    """What this worker did alone: the backend's own counts go on from load to load."""
    return replace(
        counts,
        full_passes=counts.full_passes - before.full_passes,
        prefill_passes=counts.prefill_passes - before.prefill_passes,
        late_steps=counts.late_steps - before.late_steps,
        refill_rows=counts.refill_rows - before.refill_rows,
    )


def _wait_for(ended: queue.SimpleQueue[DmtdError | None]) -> None:
    if (error := ended.get()) is not None:
        raise error
