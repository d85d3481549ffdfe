"""What Prometheus reads: vLLM's names behind the prefix ``dmtd:``, and what only this decoding has.

Gauges and most counters are the worker's own counts, an immutable snapshot: a scrape takes no lock of the engine's. Histograms
are filled by the event loop as pieces pass through it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from dmtd_runtime.serving.counts import Counts
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
    "prefix_cache_hits": ("Prompt tokens found there.", lambda c: c.prefix_hits),
    "full_passes": ("Passes through all layers.", lambda c: c.full_passes),
    "prefill_passes": ("Those of them that read prompts alone.", lambda c: c.prefill_passes),
    "late_steps": ("Steps through the decoding layers alone.", lambda c: c.late_steps),
    "dropped_tokens": ("Choices of late steps that were not kept.", lambda c: c.dropped_tokens),
    "refill_rows": ("Rows that heads of cycles refilled.", lambda c: c.refill_rows),
}


class _Histogram:
    """Counts of values by bucket, and the lines that tell them. For one thread: the event loop's."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], label: str) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0
        self._head = _head(name, text, "histogram")
        ends = [f"{bound:g}" for bound in bounds] + ["+Inf"]
        self._buckets = [f'{_PREFIX}{name}_bucket{{{label},le="{end}"}} ' for end in ends]
        self._totals = f"{_PREFIX}{name}_count{{{label}}} ", f"{_PREFIX}{name}_sum{{{label}}} "

    def observe(self, value: float, times: int = 1) -> None:
        """Take a value, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self) -> Iterable[str]:
        """As Prometheus reads them: each bucket holds what is at most its end."""
        yield self._head
        for name, count in zip(self._buckets, accumulate(self._counts), strict=True):
            yield f"{name}{count}"
        yield f"{self._totals[0]}{sum(self._counts)}"
        yield f"{self._totals[1]}{self._sum!r}"


class Metrics:
    """Of one model; ``counts`` gives the worker's snapshot. A library's registry takes milliseconds for this text."""

    def __init__(self, model_name: str, counts: Callable[[], Counts]) -> None:
        self._label = f'model_name="{_escaped(model_name)}"'
        self._counts = counts
        self._histograms = {
            name: _Histogram(name, text, bounds, self._label) for name, (text, bounds) in _HISTOGRAMS.items()
        }
        self._success: dict[str, int] = dict.fromkeys(("stop", "length"), 0)
        self._rejected: dict[str, int] = dict.fromkeys(("queue_full", "queue_timeout"), 0)

    def text(self) -> bytes:
        """One scrape."""
        counts, lines = self._counts(), []
        for name, (text, value) in _GAUGES.items():
            lines += [_head(name, text, "gauge"), f"{_PREFIX}{name}{{{self._label}}} {value(counts)}"]
        for name, (text, value) in _COUNTERS.items():
            lines += [
                _head(f"{name}_total", text, "counter"),
                f"{_PREFIX}{name}_total{{{self._label}}} {value(counts)}",
            ]
        told = (
            ("request_success_total", "Sequences that came to their ends.", "finished_reason", self._success),
            ("admission_rejections_total", "Requests not taken, or that waited too long.", "reason", self._rejected),
        )
        for name, text, label, values in told:
            lines.append(_head(name, text, "counter"))
            lines += [f'{_PREFIX}{name}{{{self._label},{label}="{each}"}} {value}' for each, value in values.items()]
        for histogram in self._histograms.values():
            lines += histogram.lines()
        return ("\n".join(lines) + "\n").encode()

    def first_token(self, seconds: float) -> None:
        """A sequence began to answer, this long after its request came."""
        self._histograms["time_to_first_token_seconds"].observe(seconds)

    def tokens(self, seconds: float, count: int) -> None:
        """``count`` more tokens of a sequence, ``seconds`` each."""
        self._histograms["inter_token_latency_seconds"].observe(seconds, count)

    def rejected(self, reason: str) -> None:
        """A request was not taken."""
        self._rejected[reason] = self._rejected.get(reason, 0) + 1

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
            self._success[reason] = self._success.get(reason, 0) + 1

    def _see(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _head(name: str, text: str, kind: str) -> str:
    return f"# HELP {_PREFIX}{name} {text}\n# TYPE {_PREFIX}{name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
