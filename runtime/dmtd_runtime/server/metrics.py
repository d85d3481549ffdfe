"""What Prometheus reads: vLLM's names behind the prefix ``dmtd:``, and what only this decoding has.

Gauges and most counters are the worker's own counts, an immutable snapshot: a scrape takes no lock of the engine's. Histograms
are filled by the event loop as pieces pass through it. The label ``engine`` is dmtd, or plain where clients may ask for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

from dmtd_runtime.serving.counts import STEP_TOKENS, Counts
from dmtd_runtime.serving.outputs import RequestOutput

_PREFIX = "dmtd:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token.", _LONG),
    "inter_token_latency_seconds": ("Between two tokens of a sequence; of tokens that came together, the mean.", _FAST),
    "request_time_per_output_token_seconds": ("Mean time of a request's tokens after the first.", _FAST),
    "e2e_request_latency_seconds": ("From arrival to end.", _LONG),
    "request_queue_time_seconds": ("Until the request had a slot.", _LONG),
    "request_prefill_time_seconds": ("From slot to first token.", _LONG),
    "request_decode_time_seconds": ("From first token to end.", _LONG),
    "request_inference_time_seconds": ("From slot to end.", _LONG),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", _TOKENS),
}
_GAUGES: dict[str, tuple[str, Callable[[Counts], float]]] = {
    "num_requests_running": ("Sequences that have a slot.", lambda c: c.running),
    "num_requests_waiting": ("Sequences that wait for one.", lambda c: c.waiting),
    "num_waiting_prompt_tokens": ("Tokens of the prompts that wait.", lambda c: c.waiting_prompt_tokens),
    "kv_cache_usage_perc": (
        "Share of the cache's rows in use, 0 to 1.",
        lambda c: _ratio(c.kv_rows, c.kv_capacity_rows),
    ),
    "prefix_cache_bytes": ("Host memory that keeps earlier prompts.", lambda c: c.prefix_cache_bytes),
    "tokens_per_full_pass": (
        "Tokens that one full pass of decoding gave, over all time.",
        lambda c: _ratio(c.generation_tokens, c.full_passes - c.prefill_passes),
    ),
    "share_in_phase": (
        "Share of cycles in which all running sequences stood at their heads.",
        lambda c: _ratio(c.head_passes_in_phase, c.head_passes),
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[Counts], float]]] = {
    "prompt_tokens": ("Prompt tokens taken in.", lambda c: c.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda c: c.generation_tokens),
    "prefix_cache_queries": ("Prompt tokens looked for in the prefix cache.", lambda c: c.prefix_queries),
    "prefix_cache_hits": (
        "Prompt tokens found there, or taken over from a sequence of the same request.",
        lambda c: c.prefix_hits,
    ),
    "full_passes": ("Passes through all layers.", lambda c: c.full_passes),
    "prefill_passes": ("Those of them that read prompts alone.", lambda c: c.prefill_passes),
    "late_steps": ("Steps through the decoding layers alone.", lambda c: c.late_steps),
    "dropped_tokens": ("Choices of late steps that were not kept.", lambda c: c.dropped_tokens),
    "refill_rows": ("Rows that heads of cycles refilled.", lambda c: c.refill_rows),
}
_NUMBERS = [(name, "gauge", text, value) for name, (text, value) in _GAUGES.items()]
_NUMBERS += [(f"{name}_total", "counter", text, value) for name, (text, value) in _COUNTERS.items()]
_STEPS = "Tokens that went through a step: of prompts, and one for each sequence that decodes."


class _Buckets:
    """The lines that tell counts of values by bucket."""

    def __init__(self, name: str, bounds: Sequence[float], label: str) -> None:
        ends = [f"{bound:g}" for bound in bounds] + ["+Inf"]
        self._buckets = [f'{_PREFIX}{name}_bucket{{{label},le="{end}"}} ' for end in ends]
        self._totals = f"{_PREFIX}{name}_count{{{label}}} ", f"{_PREFIX}{name}_sum{{{label}}} "

    def lines(self, counts: Sequence[int], total: float) -> Iterable[str]:
        """As Prometheus reads them: each bucket holds what is at most its end. ``total``: the sum of all values."""
        for name, count in zip(self._buckets, accumulate(counts), strict=True):
            yield f"{name}{count}"
        yield f"{self._totals[0]}{sum(counts)}"
        yield f"{self._totals[1]}{total!r}"


class _Histogram:
    """Values as they come. For one thread: the event loop's."""

    def __init__(self, name: str, bounds: Sequence[float], label: str) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0
        self._told = _Buckets(name, bounds, label)

    def observe(self, value: float, times: int = 1) -> None:
        """Take a value, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self) -> Iterable[str]:
        return self._told.lines(self._counts, self._sum)


class EngineMetrics:
    """What one engine does: its worker's counts, and what the event loop sees of its requests."""

    def __init__(self, label: str, counts: Callable[[], Counts]) -> None:
        self.label, self.counts = label, counts
        self.histograms = {name: _Histogram(name, bounds, label) for name, (_, bounds) in _HISTOGRAMS.items()}
        self.steps = _Buckets("iteration_tokens_total", STEP_TOKENS, label)
        self.success: dict[str, int] = dict.fromkeys(("stop", "length"), 0)
        self.rejections: dict[str, int] = dict.fromkeys(("queue_full", "queue_timeout"), 0)

    def first_token(self, seconds: float) -> None:
        """A sequence began to answer, this long after its request came."""
        self._see("time_to_first_token_seconds", seconds)

    def tokens(self, seconds: float, count: int) -> None:
        """``count`` more tokens of a sequence, ``seconds`` each."""
        self.histograms["inter_token_latency_seconds"].observe(seconds, count)

    def rejected(self, reason: str) -> None:
        """A request was not taken."""
        self.rejections[reason] = self.rejections.get(reason, 0) + 1

    def ended(self, output: RequestOutput, seconds: float) -> None:
        """A request came to its end, ``seconds`` after it came."""
        times = output.metrics
        self._see("e2e_request_latency_seconds", seconds)
        self._see("request_queue_time_seconds", times.queued_s)
        self._see("request_prompt_tokens", len(output.prompt_token_ids))
        if times.first_token_s is not None and times.finished_s is not None:
            self._see("request_prefill_time_seconds", times.first_token_s - times.queued_s)
            self._see("request_decode_time_seconds", times.finished_s - times.first_token_s)
            self._see("request_inference_time_seconds", times.finished_s - times.queued_s)
            most = max(len(each.token_ids) for each in output.outputs)
            if most > 1:
                self._see(
                    "request_time_per_output_token_seconds", (times.finished_s - times.first_token_s) / (most - 1)
                )
        for each in output.outputs:
            self._see("request_generation_tokens", len(each.token_ids))
            reason = each.finish_reason or "abort"
            self.success[reason] = self.success.get(reason, 0) + 1

    def _see(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)


class Metrics:
    """Of one model; ``engines``: name -> its worker's snapshot. A library's registry takes milliseconds for this text."""

    def __init__(self, model_name: str, engines: Mapping[str, Callable[[], Counts]]) -> None:
        label = f'model_name="{_escaped(model_name)}"'
        self.engines = {name: EngineMetrics(f'{label},engine="{name}"', counts) for name, counts in engines.items()}

    def text(self) -> bytes:
        """One scrape."""
        engines = [(engine, engine.counts()) for engine in self.engines.values()]
        lines: list[str] = []
        for name, kind, text, value in _NUMBERS:
            lines.append(_head(name, text, kind))
            lines += [f"{_PREFIX}{name}{{{engine.label}}} {value(counts)}" for engine, counts in engines]
        lines.append(_head("request_success_total", "Sequences that came to their ends.", "counter"))
        lines += self._by("request_success_total", "finished_reason", lambda engine: engine.success)
        lines.append(_head("admission_rejections_total", "Requests not taken, or that waited too long.", "counter"))
        lines += self._by("admission_rejections_total", "reason", lambda engine: engine.rejections)
        for name, (text, _) in _HISTOGRAMS.items():
            lines.append(_head(name, text, "histogram"))
            for engine, _ in engines:
                lines += engine.histograms[name].lines()
        lines.append(_head("iteration_tokens_total", _STEPS, "histogram"))
        for engine, counts in engines:
            lines += engine.steps.lines(counts.step_tokens, counts.step_tokens_sum)
        return ("\n".join(lines) + "\n").encode()

    def _by(self, name: str, label: str, values: Callable[[EngineMetrics], Mapping[str, int]]) -> Iterable[str]:
        for engine in self.engines.values():
            for each, value in values(engine).items():
                yield f'{_PREFIX}{name}{{{engine.label},{label}="{each}"}} {value}'


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _head(name: str, text: str, kind: str) -> str:
    return f"# HELP {_PREFIX}{name} {text}\n# TYPE {_PREFIX}{name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
