"""Sequences that come to a loop and go: visits, and what each of their sequences was told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from runtime_support import RecordingSampler, random_prompt

from dmtd_runtime.backends.base import Backend
from dmtd_runtime.bundle.manifest import CycleInfo
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import Loop
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import FinishReason, SequenceRun, TokenEvent

VOCAB = 259
TAUS = (1, 2, 3, 4, 8, 256)


def plan_of(tau: int, convention: tuple[str, str] = ("prompt", "thinking"), *, plain: bool = False) -> CyclePlan:
    cycle = CycleInfo(
        encoding_layers=0,
        thinking_layers=3,
        decoding_layers=2,
        cycle_length=tau,
        cycle_origin=convention[0],  # type: ignore[arg-type]
        prompt_input=convention[1],  # type: ignore[arg-type]
        dmtd_trained=True,
    )
    return CyclePlan(cycle=cycle, plain=plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request: when it comes, what it asks, and when it is ended from outside, in steps of the loop."""

    at: int
    shared: int  # tokens that its prompt has in common with others
    own: int
    tokens: int
    temperature: float
    seed: int
    priority: int
    salt: str | None
    leaves: int | None = None  # so many steps after it came
    enough: int | None = None  # leaves on hearing so many tokens, in the middle of a step
    reason: FinishReason = "abort"  # why it leaves; "deadline": its own has passed
    logprobs: int | None = None  # the host must see every token
    n: int = 1  # sequences
    min_confidence: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def prompt(self) -> list[int]:
        return [*_ids(7, 64)[: self.shared], *_ids(self.seed, self.own)]

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=self.tokens,
            ignore_eos=True,
            logprobs=self.logprobs,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass(slots=True)
class Guest:
    """One sequence of a visit, and what it was told."""

    visit: Visit
    index: int = 0
    sampler: RecordingSampler = field(init=False)
    sequence: SequenceRun = field(init=False)
    events: list[TokenEvent] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[tuple[int, int, int]] = field(default_factory=list)  # by token: full passes, late steps, dropped ones
    reason: FinishReason | None = None

    def __post_init__(self) -> None:
        prompt, params = self.visit.prompt, self.visit.params
        self.sampler = RecordingSampler(params, vocab_size=VOCAB, prompt_ids=prompt, sequence=self.index)
        self.sequence = SequenceRun(
            ids=prompt,
            sampler=self.sampler,
            stops=StopRules(params),
            on_event=self._hear,
            cancelled=lambda: self.reason,
            min_confidence=self.visit.min_confidence,
            priority=self.visit.priority,
            cache_salt=self.visit.salt,
            group=id(self.visit) if self.visit.n > 1 else 0,
        )

    def _hear(self, event: TokenEvent) -> None:
        self.events.append(event)
        if event.choice is not None:
            self.tokens.append(event.choice.token_id)
            self.steps.append((self.sequence.full_passes, self.sequence.late_steps, self.sequence.dropped_tokens))
            if len(self.tokens) == self.visit.enough:
                self.end()

    def end(self) -> None:
        """From outside, as soon as the loop looks."""
        if self.visit.reason == "deadline":
            self.sequence.deadline = -math.inf
        else:
            self.reason = self.visit.reason


def serve(backend: Backend, plan: CyclePlan, visits: Sequence[Visit], options: ServingOptions) -> list[Guest]:
    """Let everybody come at their step, until nobody is left."""
    loop = Loop(backend, plan, options=options)
    guests, step = [_guest(backend, visit, index) for visit in visits for index in range(visit.n)], 0
    last = max(visit.at for visit in visits)
    while loop.sequences or step <= last:
        leaving = []
        for guest in guests:
            at, leaves = guest.visit.at, guest.visit.leaves
            if at == step:
                loop.add(guest.sequence)
            if leaves is not None and at + leaves == step:
                guest.end()
                leaving.append(guest)
        loop.step()
        step += 1
        assert all(guest.sequence.ended for guest in leaving), "somebody was ended, and stayed"
        assert step < 5_000, "somebody waits for ever"
    counts = loop.counts()
    assert (counts.running, counts.waiting, counts.kv_rows) == (0, 0, 0), "a slot has leaked"
    assert counts.head_passes == counts.head_passes_in_phase
    assert counts.prefix_cache_bytes <= options.prefix_cache_bytes
    return guests


def alone(backend: Backend, plan: CyclePlan, visit: Visit, index: int = 0) -> Guest:
    guest = _guest(backend, visit, index)
    loop = Loop(backend, plan)
    loop.add(guest.sequence)
    while loop.sequences:
        loop.step()
    return guest


def _guest(backend: Backend, visit: Visit, index: int) -> Guest:
    guest = Guest(visit, index)
    guest.sampler.records = not backend.runs_cycles  # a device's own choice is not to be taken from it
    return guest


@cache
def _ids(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random_prompt(seed, length))
