"""Sequences that come to a loop and go: visits as hypothesis draws them, and what each was told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import Phase
from hypothesis import strategies as st
from runtime_support import CONVENTIONS, MAX_BATCH, RecordingSampler, random_prompt

from dmtd_runtime.backends.base import Backend
from dmtd_runtime.bundle.manifest import CycleInfo
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import Loop
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.sequence import FinishReason, SequenceRun, TokenEvent

VOCAB = 259
PHASES = (Phase.explicit, Phase.generate)  # shrinking a case over models takes longer than reading it


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
    """One request: when it comes, what it asks, and when it is cancelled, in steps of the loop."""

    at: int
    shared: int  # tokens that its prompt has in common with others
    own: int
    tokens: int
    temperature: float
    seed: int
    priority: int
    salt: str | None
    leaves: int | None = None
    logprobs: int | None = None  # the host must see every token
    n: int = 1  # sequences
    min_confidence: float = 0.0

    @property
    def prompt(self) -> list[int]:
        return random_prompt(7, 64)[: self.shared] + random_prompt(self.seed, self.own)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=self.tokens,
            ignore_eos=True,
            logprobs=self.logprobs,
        )


@dataclass(slots=True)
class Guest:
    """One sequence of a visit, and what it was told."""

    visit: Visit
    index: int = 0
    sampler: RecordingSampler = field(init=False)
    sequence: SequenceRun = field(init=False)
    events: list[TokenEvent] = field(default_factory=list)
    reason: FinishReason | None = None

    def __post_init__(self) -> None:
        prompt, params = self.visit.prompt, self.visit.params
        self.sampler = RecordingSampler(params, vocab_size=VOCAB, prompt_ids=prompt, sequence=self.index)
        self.sequence = SequenceRun(
            ids=prompt,
            sampler=self.sampler,
            stops=StopRules(params),
            on_event=self.events.append,
            cancelled=lambda: self.reason,
            min_confidence=self.visit.min_confidence,
            priority=self.visit.priority,
            cache_salt=self.visit.salt,
            group=id(self.visit) if self.visit.n > 1 else 0,
        )

    @property
    def steps(self) -> tuple[int, int, int]:
        """Full passes, late steps, and those of them that were dropped."""
        return self.sequence.full_passes, self.sequence.late_steps, self.sequence.dropped_tokens

    @property
    def tokens(self) -> list[int]:
        return [event.choice.token_id for event in self.events if event.choice is not None]


def serve(backend: Backend, plan: CyclePlan, visits: Sequence[Visit], options: ServingOptions) -> list[Guest]:
    """Let everybody come at their step, until nobody is left."""
    loop = Loop(backend, plan, options=options)
    guests, step = [_guest(backend, visit, index) for visit in visits for index in range(visit.n)], 0
    while loop.sequences or any(guest.visit.at >= step for guest in guests):
        for guest in guests:
            if guest.visit.at == step:
                loop.add(guest.sequence)
            if guest.visit.leaves is not None and guest.visit.at + guest.visit.leaves == step:
                guest.reason = "abort"
        loop.step()
        step += 1
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


visits = st.builds(
    Visit,
    at=st.integers(0, 25),
    shared=st.sampled_from((0, 5, 16, 40, 64)),
    own=st.integers(1, 60),
    tokens=st.integers(1, 20),
    temperature=st.sampled_from((0.0, 0.0, 1.5)),
    seed=st.integers(0, 1 << 20),
    priority=st.integers(0, 1),
    salt=st.sampled_from((None, None, "a")),
    leaves=st.sampled_from((None, None, None, 0, 3, 9)),
    logprobs=st.sampled_from((None, None, None, 1)),
    n=st.sampled_from((1, 1, 1, 3)),
    min_confidence=st.sampled_from((0.0, 0.0, 0.1, 0.2, 0.5, 0.6, 1.0)),
)
all_options = st.builds(
    ServingOptions,
    max_num_batched_tokens=st.sampled_from((None, 8, 64)),
    long_prefill_token_threshold=st.sampled_from((None, 1, 16)),
    max_num_partial_prefills=st.integers(1, 3),
    prefix_cache_bytes=st.sampled_from((0, 100_000, 1 << 28)),
)
plans = st.tuples(st.integers(1, 6), st.sampled_from(CONVENTIONS), st.sampled_from((False, False, False, True)))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    plan, guests = draw(plans), draw(st.lists(visits, min_size=1, max_size=12))
    if plan[1][0] == "absolute" or plan[2]:  # nothing leaves a cycle there
        guests = [replace(visit, min_confidence=0.0) for visit in guests]
    return {
        "family": draw(st.sampled_from(("qwen3", "llama"))),
        "encoding_layers": draw(st.sampled_from((0, 2))),
        "dialect": draw(st.sampled_from(("onnxruntime", "onnxruntime", "standard"))),
        "full_pass": draw(st.sampled_from(("staged", "fused"))),
        "slots": draw(st.sampled_from((1, 3, MAX_BATCH))),
        "plan": plan,
        "options": draw(all_options),
        "visits": guests,
    }
