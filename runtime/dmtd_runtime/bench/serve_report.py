"""Figures of serving loads, from what their sequences were told. Draws nothing, runs nothing.

Latencies have the usual names: to the first token (TTFT), between two tokens (ITL), end to end (E2E), from the moment a
sequence was submitted. Repeats of a load are pooled: latencies together, rates from the sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from dmtd_runtime.bench.drive import LoadRun, SequenceRecord

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds; ``max`` is the longest of all."""

    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeFigures:
    """One mode under one load.

    ``loaded_tok_per_s`` counts generated tokens while the load lasted: until the last sequence got a slot, or to the end where
    none had to wait. ``full_passes_per_token``: passes over T that a sequence lived through for each of its tokens; 1 / tau
    where no pass runs without it. ``longest_gap_cycles``: the longest gap between two tokens, over the median time of as many
    tokens of a sequence as a cycle has while nobody's prompt was being read; None where there was no such time.
    ``in_phase_share`` of the passes at a head had everybody there. Of the time in which somebody was served, ``outside_share``
    was spent outside of sessions, and ``loop_share`` outside of the backend's runs, which fill inputs and choose tokens: in
    scheduler, loop and prefix cache. ``running``: sequences that had a slot, on average over that time. ``prefix_hit_share`` of
    the prompt tokens came from the prefix cache.
    """

    requests: int
    duration_s: float
    requests_per_s: float
    output_tok_per_s: float
    total_tok_per_s: float
    loaded_tok_per_s: float
    ttft_ms: Latency
    itl_ms: Latency | None
    e2e_ms: Latency
    longest_gap_cycles: float | None
    full_passes_per_token: float | None
    in_phase_share: float | None
    running: float
    outside_share: float
    loop_share: float
    prefix_hit_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One load with ``slots`` slots. ``request_rate`` is None in a closed loop, and infinite where all came at once.

    Ratios compare ``loaded_tok_per_s``, the median over pairs of repeats; the static batch's rate counts its prompts too.
    """

    slots: int
    request_rate: float | None
    concurrency: int | None
    dmtd: ModeFigures
    plain: ModeFigures
    static_tok_per_s: float
    ratio: float
    ratio_of_static: float
    ratios: tuple[float, ...]
    ratios_of_static: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReport:
    """All loads, and under which conditions."""

    conditions: dict[str, Any]
    loads: tuple[LoadReport, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object; an infinite rate is the word "inf"."""
        loads = [dataclasses.asdict(load) for load in self.loads]
        for load in loads:
            load["request_rate"] = rate_for_json(load["request_rate"])
        return {"schema": SCHEMA, "conditions": self.conditions, "loads": loads}


def rate_for_json(rate: float | None) -> float | str | None:
    """A rate as JSON can have it."""
    return "inf" if rate is not None and math.isinf(rate) else rate


def load_report(
    *,
    slots: int,
    request_rate: float | None,
    concurrency: int | None,
    dmtd: Sequence[LoadRun],
    plain: Sequence[LoadRun],
    static_tok_per_s: Sequence[float],
) -> LoadReport:
    """The figures of one load: as many runs of each kind, in the order they ran."""
    rates = [loaded_tok_per_s([run]) for run in dmtd]
    ratios = tuple(ours / loaded_tok_per_s([theirs]) for ours, theirs in zip(rates, plain, strict=True))
    of_static = tuple(ours / limit for ours, limit in zip(rates, static_tok_per_s, strict=True))
    return LoadReport(
        slots=slots,
        request_rate=request_rate,
        concurrency=concurrency,
        dmtd=figures_of(dmtd),
        plain=figures_of(plain),
        static_tok_per_s=median(static_tok_per_s),
        ratio=median(ratios),
        ratio_of_static=median(of_static),
        ratios=ratios,
        ratios_of_static=of_static,
    )


def figures_of(runs: Sequence[LoadRun]) -> ModeFigures:
    """Pooled over repeats of one load."""
    sequences = [sequence for run in runs for sequence in run.sequences]
    duration = sum(_end(run) for run in runs)
    busy = sum(_busy_s(run.sequences) for run in runs)
    tokens = sum(len(sequence.token_s) for sequence in sequences)
    prompt_tokens = sum(sequence.prompt_len for sequence in sequences)
    gaps = [gap for sequence in sequences for gap in np.diff(sequence.token_s).tolist()]
    cycles = [seconds for run in runs for seconds in undisturbed_cycles(run)]
    heads = sum(run.counts.head_passes for run in runs)
    return ModeFigures(
        requests=len(sequences),
        duration_s=duration,
        requests_per_s=len(sequences) / duration,
        output_tok_per_s=tokens / duration,
        total_tok_per_s=(tokens + prompt_tokens) / duration,
        loaded_tok_per_s=loaded_tok_per_s(runs),
        ttft_ms=latency(sequence.token_s[0] - sequence.submitted_s for sequence in sequences),
        itl_ms=latency(gaps) if gaps else None,
        e2e_ms=latency(sequence.token_s[-1] - sequence.submitted_s for sequence in sequences),
        longest_gap_cycles=max(gaps) / median(cycles) if cycles else None,
        full_passes_per_token=sum(sequence.full_passes for sequence in sequences) / len(gaps) if gaps else None,
        in_phase_share=sum(run.counts.head_passes_in_phase for run in runs) / heads if heads else None,
        running=sum(sequence.token_s[-1] - sequence.started_s for sequence in sequences) / busy,
        outside_share=1 - sum(run.session_seconds for run in runs) / busy,
        loop_share=1 - sum(run.backend_seconds for run in runs) / busy,
        prefix_hit_share=sum(sequence.cached_tokens for sequence in sequences) / prompt_tokens,
    )


def latency(seconds: Iterable[float]) -> Latency:
    """Percentiles of some times, at least one."""
    ms = np.array(list(seconds)) * 1e3
    p50, p90, p99 = np.percentile(ms, [50, 90, 99]).tolist()
    return Latency(p50=p50, p90=p90, p99=p99, max=float(ms.max()))


def undisturbed_cycles(run: LoadRun) -> list[float]:
    """Seconds of every cycle's number of tokens of a sequence during which no prompt was being read."""
    reading = sorted((sequence.started_s, sequence.token_s[0]) for sequence in run.sequences)
    begins, ends = (np.array(each) for each in zip(*reading, strict=True))
    ends, found = np.maximum.accumulate(ends), list[float]()
    for sequence in run.sequences:
        first = np.array(sequence.token_s[: -run.cycle_length])
        last = np.array(sequence.token_s[run.cycle_length :])
        begun = np.searchsorted(begins, last)  # prompts whose reading began before the last token
        undisturbed = ends[begun - 1] <= first  # its own began, so there is one
        found += (last - first)[undisturbed].tolist()
    return found


def loaded_tok_per_s(runs: Sequence[LoadRun]) -> float:
    """Generated tokens over the time until nobody waited any more, or over all where nobody ever did."""
    tokens, seconds = 0, 0.0
    for run in runs:
        last = max(sequence.started_s for sequence in run.sequences)
        told = sum(at <= last for sequence in run.sequences for at in sequence.token_s)
        if told == 0:
            last, told = _end(run), sum(len(sequence.token_s) for sequence in run.sequences)
        tokens, seconds = tokens + told, seconds + last
    return tokens / seconds


def _end(run: LoadRun) -> float:
    return max(sequence.token_s[-1] for sequence in run.sequences)


def _busy_s(sequences: Sequence[SequenceRecord]) -> float:
    """Seconds in which at least one sequence was waiting or running."""
    busy, until = 0.0, 0.0
    for begin, end in sorted((sequence.submitted_s, sequence.token_s[-1]) for sequence in sequences):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy
