"""What ``dmtd bench`` prints for people: the card, the table of a static batch and that of serving loads, the conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dmtd_errors.words import counted
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.bench.measure import BatchReport, BenchOptions, BenchReport, Mode
from dmtd_runtime.bench.serve_report import Latency, LoadReport, ModeFigures, ServeReport
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.bundle.speed_bound import SplitBytes, mean_context, weight_formats
from dmtd_runtime.cli.common import human_bytes


def card(manifest: Manifest, split: SplitBytes, options: BenchOptions, backend: BackendOptions) -> Table:
    cycle, model = manifest.cycle, manifest.model
    context = mean_context(options.prompt_len, options.max_tokens)
    tau = cycle.cycle_length
    plain, dmtd = split.plain_step(context), split.cycle(context) / tau
    card = Table(show_header=False, box=None, pad_edge=False)
    card.add_column(style="bold")
    card.add_column(overflow="fold")
    card.add_row(
        "model",
        f"{model.family}, E{cycle.encoding_layers} T{cycle.thinking_layers} D{cycle.decoding_layers}, "
        f"cycle of {tau}, {model.dtype}",
    )
    card.add_row(
        "weights",
        f"{human_bytes(split.stored)} (T {human_bytes(split.thinking)}, D {human_bytes(split.decoding)}, "
        f"lm_head {human_bytes(split.lm_head)}{', E ' + human_bytes(split.encoding) if split.encoding else ''})",
    )
    if manifest.quantised:
        formats = weight_formats(manifest)
        card.add_row("formats", "; ".join(f"{group.replace('_', ' ')} {fmt}" for group, fmt in formats.items()))
    card.add_row("KV", f"{model.cache_dtype}, {human_bytes(split.kv_per_token())} a token, mean context {context:g}")
    card.add_row("bytes a token", f"plain {human_bytes(plain)}, DMTD {human_bytes(dmtd)}")
    card.add_row("bound", f"{plain / dmtd:.2f}x (what the bytes allow at batch 1)")
    card.add_row(
        "run",
        f"batch {', '.join(map(str, options.batches))}; prompt {options.prompt_len}, {options.max_tokens} new tokens; "
        f"{counted(options.repeats, 'repeat')}; {_where(backend)}",
    )
    return card


def _where(backend: BackendOptions) -> str:
    if backend.backend == "onnxruntime":
        return backend.device
    return f"engines of {backend.backend}"


def table(report: BenchReport) -> Table:
    table = Table(pad_edge=False, box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for batch in report.batches:
        table.add_column(f"batch {batch.batch}", justify="right")
    for name, cell in _rows(report):
        table.add_row(name, *(cell(batch) for batch in report.batches))
    return table


Cell = Callable[[BatchReport], str]


def _rows(report: BenchReport) -> list[tuple[str, Cell]]:
    """Names and cells of the table's rows."""
    rows: list[tuple[str, Cell]] = [
        ("plain, tok/s", lambda b: f"{b.plain_tok_per_s:.1f}"),
        ("  lowest-highest", lambda b: _range(b, "plain")),
        ("DMTD, tok/s", lambda b: f"{b.dmtd_tok_per_s:.1f}"),
        ("  lowest-highest", lambda b: _range(b, "dmtd")),
        ("ratio", lambda b: f"{b.ratio:.2f}x"),
        ("  lowest-highest", lambda b: f"{min(b.ratios):.2f}-{max(b.ratios):.2f}"),
        ("bound of the bytes", lambda b: f"{b.bound:.2f}x"),
        ("ratio of the bound", lambda b: f"{b.ratio_of_bound:.0%}"),
        *(
            [
                ("bound of the kernels", lambda b: f"{b.kernel_bound:.2f}x"),
                ("ratio of that bound", lambda b: f"{b.ratio_of_kernel_bound:.0%}"),
            ]
            if report.batches[0].kernel_bound is not None
            else []
        ),
        ("ratio of median steps", lambda b: "-" if b.ratio_of_steps is None else f"{b.ratio_of_steps:.2f}x"),
        ("prefill, tok/s", lambda b: f"{b.prefill_tok_per_s:.0f}"),
        ("first token, ms", lambda b: f"{b.first_token_ms:.0f}"),
        ("plain step, ms", lambda b: _ms(b.plain_step_ms)),
        ("full pass, ms", lambda b: _ms(b.full_pass_ms)),
        ("late step, ms", lambda b: _ms(b.late_step_ms)),
        ("cycle, ms", lambda b: _ms(b.cycle_ms)),
        ("  waiting for the host", lambda b: _ms(b.host_ms_per_cycle)),
        ("full passes a token", lambda b: f"{b.full_passes_per_token:.3f}"),
        ("refilled rows a run", lambda b: str(b.refill_rows)),
        ("outside the sessions", lambda b: f"{b.outside_share:.1%}"),
        ("  in plain mode", lambda b: f"{b.plain_outside_share:.1%}"),
        ("read, GB/s", lambda b: f"{b.dmtd_gb_per_s:.1f}"),
        ("  in plain mode", lambda b: f"{b.plain_gb_per_s:.1f}"),
        ("private memory", lambda b: "-" if b.private_bytes is None else human_bytes(b.private_bytes)),
        ("KV used", lambda b: human_bytes(b.kv_bytes)),
        ("KV reserved", lambda b: human_bytes(b.kv_capacity_bytes)),
    ]
    if report.batches[0].whole_model_tok_per_s is not None:
        rows += [
            ("one whole graph, tok/s", lambda b: f"{b.whole_model_tok_per_s:.1f}"),
            ("  lowest-highest", lambda b: _range(b, "whole_model")),
            ("plain / one whole graph", lambda b: f"{b.plain_over_whole_model:.3f}"),
            ("DMTD / one whole graph", lambda b: f"{b.dmtd_over_whole_model:.3f}"),
        ]
    return rows


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _range(batch: BatchReport, mode: Mode) -> str:
    rates = [run.decode_tok_per_s for run in batch.runs[mode]]
    return f"{min(rates):.1f}-{max(rates):.1f}"


def footer(report: BenchReport) -> Text:
    """The conditions of a static batch's table."""
    facts = report.conditions
    repeats = "one repeat" if facts["repeats"] == 1 else f"medians of {facts['repeats']} interleaved repeats"
    line = f"{repeats}; {_way(facts)}"
    if facts["full_pass"] == "fused":
        line += f", whose graph repeats D and lm_head: {human_bytes(report.split.fused_extra)} more memory"
    return _conditions(facts, [line])


def _way(facts: dict[str, Any]) -> str:
    """How full passes ran."""
    return f"{facts['full_pass']} full pass" if facts["full_pass"] else "one graph runs all, whole cycles where it can"


def _conditions(facts: dict[str, Any], lines: list[str]) -> Text:
    load = facts["load_average"]
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    gpu = f"{facts['gpu']}, driver {facts['driver']}; " if facts["gpu"] else ""
    library = facts["tensorrt"] or facts["onnxruntime"]
    lines = [
        f"{gpu}{facts['cpu']}, {facts['cores']:g} cores, {counted(facts['threads'], 'thread')}; {library}, "
        f"{facts['dialect']} dialect; dmtd {facts['dmtd']}{commit}",
        *lines,
    ]
    if load is not None and load > 0.5:
        lines.append(
            f"load average {load:.1f} when this began: if other work goes on, rates are lower than the machine can do"
        )
    return Text("\n".join(lines), style="dim")


def serve_table(report: ServeReport) -> Table:
    """One column a load; rows of DMTD, and below each what plain decoding did."""
    table = Table(pad_edge=False, box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for load in report.loads:
        table.add_column(f"{counted(load.slots, 'slot')}, {_arrivals(load)}", justify="right")
    for name, cell in _RATIOS:
        table.add_row(name, *(cell(load) for load in report.loads))
    for name, figure in _FIGURES:
        table.add_row(name, *(figure(load.dmtd) for load in report.loads))
        table.add_row("  plain", *(figure(load.plain) for load in report.loads))
    return table


def serve_footer(report: ServeReport) -> Text:
    """The conditions of the loads' table."""
    facts = report.conditions
    repeats = "one repeat" if facts["repeats"] == 1 else f"{facts['repeats']} interleaved repeats pooled"
    lengths = f"prompts of {facts['prompt_len']:.0f} and {facts['max_tokens']:.0f} new tokens on average"
    return _conditions(
        facts,
        [
            f"{lengths}; {repeats}, after {facts['warmup']} warm-up; {_way(facts)}",
            "ratios are of tokens/s while the load lasts; static: all slots begin and end together, prompts included",
        ],
    )


def _arrivals(load: LoadReport) -> str:
    if load.request_rate is None:
        return f"{load.concurrency} under way"
    return "all at once" if load.request_rate == float("inf") else f"{load.request_rate:g}/s"


def _percentiles(latency: Latency | None, *, longest: bool = False) -> str:
    if latency is None:
        return "-"
    shown = [latency.p50, latency.p90, latency.p99, *([latency.max] if longest else [])]
    return " / ".join(f"{value:.0f}" for value in shown)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


_RATIOS: list[tuple[str, Callable[[LoadReport], str]]] = [
    ("DMTD / plain", lambda load: f"{load.ratio:.2f}x"),
    ("  lowest-highest", lambda load: f"{min(load.ratios):.2f}-{max(load.ratios):.2f}"),
    ("DMTD / static batch", lambda load: f"{load.ratio_of_static:.2f}x"),
    ("static batch, tok/s", lambda load: f"{load.static_tok_per_s:.1f}"),
]
_FIGURES: list[tuple[str, Callable[[ModeFigures], str]]] = [
    ("while the load lasts, tok/s", lambda f: f"{f.loaded_tok_per_s:.1f}"),
    ("generated, tok/s", lambda f: f"{f.output_tok_per_s:.1f}"),
    ("with prompts, tok/s", lambda f: f"{f.total_tok_per_s:.1f}"),
    ("requests/s", lambda f: f"{f.requests_per_s:.2f}"),
    ("first token, ms: p50 / 90 / 99", lambda f: _percentiles(f.ttft_ms)),
    ("between tokens, ms: and longest", lambda f: _percentiles(f.itl_ms, longest=True)),
    (
        "longest, in cycles without prompts",
        lambda f: "-" if f.longest_gap_cycles is None else f"{f.longest_gap_cycles:.1f}",
    ),
    ("end to end, ms", lambda f: _percentiles(f.e2e_ms)),
    (
        "full passes a token, sequence",
        lambda f: "-" if f.full_passes_per_token is None else f"{f.full_passes_per_token:.3f}",
    ),
    ("heads in phase", lambda f: _share(f.in_phase_share)),
    ("running on average", lambda f: f"{f.running:.1f}"),
    ("outside the sessions", lambda f: _share(f.outside_share)),
    ("  in scheduler and loop", lambda f: _share(f.loop_share)),
    ("prompts from the cache", lambda f: _share(f.prefix_hit_share)),
]
