"""One timed run of the benchmark: a batch of prompts through the product's loop, and the times of its steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

from dmtd_runtime.backends.base import Backend, Rows, RunOutput, SlotCycle, SlotStep
from dmtd_runtime.bench.lent import LentBackend
from dmtd_runtime.cycle import CyclePlan, StepKind
from dmtd_runtime.errors import DmtdError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import run_batch
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run of one mode. Rates count the tokens of all sequences; times of steps are medians."""

    tok_per_s: float  # over all, prompts included
    prefill_tok_per_s: float
    decode_tok_per_s: float
    first_token_ms: float
    full_pass_ms: float | None  # None where whole cycles ran, and no step of its own
    late_step_ms: float | None
    cycle_ms: float | None  # of as many steps as a cycle has, in plain mode too; None where steps ran one by one
    host_ms_per_cycle: float | None  # of it, the time that the device waited for the host
    outside_share: float
    full_passes: int
    late_steps: int
    refill_rows: int


class _StepClock(LentBackend):
    """Notes the kind and time of every step, and what the sessions had used by then."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.marks: list[tuple[StepKind | Literal["cycle"], float, float]] = []
        self.cycle_ends: list[float] = []

    def run(
        self, steps: Sequence[SlotStep], committed: Sequence[int], *, choose: bool = False, rows: Rows = "last"
    ) -> RunOutput:
        self.marks.append((steps[0].step.kind, time.perf_counter(), self.stats.session_seconds))
        return super().run(steps, committed, choose=choose, rows=rows)

    def start_cycle(self, slots: Sequence[SlotCycle], committed: Sequence[int], *, follows: bool = False) -> None:
        self.marks.append(("cycle", time.perf_counter(), self.stats.session_seconds))
        super().start_cycle(slots, committed, follows=follows)

    def finish_cycle(self) -> RunOutput:
        output = super().finish_cycle()
        self.cycle_ends.append(time.perf_counter())
        return output


def greedy_sequence(
    prompt: Sequence[int],
    vocab_size: int,
    max_tokens: int,
    on_event: Callable[[TokenEvent], None],
    min_confidence: float = 0.0,
) -> SequenceRun:
    """A sequence of exactly ``max_tokens`` new tokens, whatever they are."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    return SequenceRun(
        ids=list(prompt),
        sampler=Sampler(params, vocab_size=vocab_size, prompt_ids=prompt, seed=0),
        stops=StopRules(params),
        on_event=on_event,
        min_confidence=min_confidence,
    )


def run_once(
    backend: Backend,
    plan: CyclePlan,
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    max_tokens: int,
    min_confidence: float = 0.0,
) -> RunRecord:
    """Generate ``max_tokens`` tokens for each prompt, greedily, and take the times."""
    clock = _StepClock(backend)
    told: list[tuple[float, float]] = []
    errors: list[DmtdError] = []

    def on_event(event: TokenEvent) -> None:
        if event.error is not None:
            errors.append(event.error)
        told.append((time.perf_counter(), backend.stats.session_seconds))

    sequences = [greedy_sequence(prompt, vocab_size, max_tokens, on_event, min_confidence) for prompt in prompts]
    before = replace(backend.stats)
    start = time.perf_counter()
    run_batch(clock, plan, sequences)
    if errors:
        raise errors[0]
    (end, end_session), batch = told[-1], len(prompts)
    decode = [mark for mark in clock.marks if mark[0] != "prefill"]
    stops = [*(at for _, at, _ in decode[1:]), end]
    steps_ms = [(kind, (stop - at) * 1e3) for (kind, at, _), stop in zip(decode, stops, strict=True)]
    full, late = ([ms for kind, ms in steps_ms if kind == wanted] for wanted in ("full", "late"))
    ends, stats = clock.cycle_ends, backend.stats
    cycles_ms = [(stop - at) * 1e3 for at, stop in itertools.pairwise(ends)]
    cycles, waited_s = stats.cycles - before.cycles, stats.host_seconds - before.host_seconds
    _, decode_start, decode_session = decode[0]
    seconds = end - decode_start
    return RunRecord(
        tok_per_s=batch * max_tokens / (end - start),
        prefill_tok_per_s=sum(map(len, prompts)) / (decode_start - start),
        decode_tok_per_s=batch * (max_tokens - 1) / seconds,
        first_token_ms=(told[0][0] - start) * 1e3,
        full_pass_ms=median(full) if full and not cycles_ms else None,
        late_step_ms=median(late) if late and not cycles_ms else None,
        cycle_ms=median(cycles_ms) if cycles_ms else None,
        host_ms_per_cycle=waited_s / cycles * 1e3 if cycles else None,
        outside_share=1 - (end_session - decode_session) / seconds,
        full_passes=stats.full_passes - before.full_passes - (stats.prefill_passes - before.prefill_passes),
        late_steps=stats.late_steps - before.late_steps,
        refill_rows=stats.refill_rows - before.refill_rows,
    )


def private_bytes() -> int | None:
    """Anonymous memory of this process (RssAnon); None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    fields = [line.split() for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(fields[0][1]) * 1024 if fields else None
