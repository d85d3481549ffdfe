"""A worker over a backend without a model, and clients that note what their sequences are told."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from dmtd_runtime.backends.base import Rows, RunOutput, RunStats, SlotStep, StepwiseBackend
from dmtd_runtime.bundle.manifest import CycleInfo
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import BackendError, DmtdError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Sampler, best_tokens
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent
from dmtd_runtime.serving.worker import Worker

VOCAB = 16
CYCLE = CycleInfo(
    encoding_layers=0,
    thinking_layers=3,
    decoding_layers=2,
    cycle_length=4,
    cycle_origin="absolute",
    prompt_input="cyclical",
    dmtd_trained=True,
)


class ScriptedBackend(StepwiseBackend):
    """A backend without a model: the next token is the last one plus 1. Keeps what it was asked."""

    capacity = max_model_len = 1 << 20
    max_rows = 64

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.stats = RunStats()
        self.asked: list[list[SlotStep]] = []
        self.cleared: list[int] = []
        self.closed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.fail_at: int | None = None
        self.nan_slots: set[int] = set()

    def run(
        self, steps: Sequence[SlotStep], committed: Sequence[int], *, choose: bool = False, rows: Rows = "last"
    ) -> RunOutput:
        assert len(committed) == self.slots
        assert all(committed[s.slot] == s.step.late.start for s in steps), "the rows of a slot are counted once"
        assert self.gate.wait(120), "the test never opened the gate"
        self.asked.append(list(steps))
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise BackendError("the device is gone")
        found = [np.eye(VOCAB, dtype=np.float32)[(s.ids[-1] + 1) % VOCAB] for s in steps if s.step.wants_logits]
        logits = np.stack(found) if found else np.zeros((0, VOCAB), np.float32)
        for row, s in enumerate(s for s in steps if s.step.wants_logits):
            if s.slot in self.nan_slots:
                logits[row] = np.nan
        return RunOutput(tokens=best_tokens(logits)) if choose else RunOutput(logits=logits)

    def clear(self, slot: int, rows: int) -> None:
        self.cleared.append(slot)

    def move(self, source: int, target: int, rows: int) -> None: ...

    def close(self) -> None:
        self.closed += 1


class Client:
    """One sequence and what it was told."""

    def __init__(self, first: int = 0, tokens: int = 5, deadline: float | None = None, prompt_len: int = 1) -> None:
        self.events: list[TokenEvent] = []
        self.done = threading.Event()
        self.reason: str | None = None
        params = SamplingParams(temperature=0, max_tokens=tokens)
        prompt = [*range(first - prompt_len + 1, first + 1)]
        self.sequence = SequenceRun(
            ids=[token % VOCAB for token in prompt],
            sampler=Sampler(params, vocab_size=VOCAB, prompt_ids=[], seed=0),
            stops=StopRules(params),
            on_event=self._take,
            cancelled=lambda: self.reason,
            deadline=deadline,
        )

    def _take(self, event: TokenEvent) -> None:
        assert not self.done.is_set(), "an event after the end"
        self.events.append(event)
        if event.finish_reason or event.error:
            self.done.set()

    def wait(self) -> Client:
        assert self.done.wait(120), "the sequence never ended"
        return self

    @property
    def tokens(self) -> list[int]:
        return [event.choice.token_id for event in self.events if event.choice]

    @property
    def end(self) -> str | DmtdError | None:
        return self.events[-1].error or self.events[-1].finish_reason


def made(backend: ScriptedBackend, **options: int) -> Worker:
    return Worker(backend, CyclePlan(cycle=CYCLE), options=ServingOptions(prefix_cache_bytes=0, **options))
