"""``dmtd bench``: the static card, the measured table, or one JSON object. Measuring is ``dmtd_runtime.bench.measure``'s."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.bench.measure import BatchReport, BenchOptions, BenchReport, Mode, OnRun, check_options, run_bench
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.bundle.speed_bound import SplitBytes, mean_context, split_bytes
from dmtd_runtime.cli.common import (
    BundleArgument,
    BundleOption,
    JsonOption,
    error_console,
    human_bytes,
    pick,
)
from dmtd_runtime.cli.options.backend import BenchBackend
from dmtd_runtime.cli.options.bench import BenchGroup


def bench(
    bundle: BundleArgument = None,
    model: BundleOption = None,
    options: BenchGroup = BenchOptions(),
    backend: BenchBackend = BackendOptions(),
    json: JsonOption = False,
) -> None:
    """Measure plain and DMTD decoding, interleaved on the same weights and prompts.

    Prompts are random token ids, decoding is greedy, and no sequence ends early.

    The numbers are medians over the repeats.
    """
    directory = pick(bundle, model, "BUNDLE")
    manifest = open_bundle(directory)
    check_options(options, manifest, backend)
    console = Console(highlight=False)
    if not json:
        console.print(_card(manifest, split_bytes(manifest), options, backend))
    with _progress() as on_run:
        report = run_bench(directory, manifest, options, backend, on_run=on_run)
    if json:
        typer.echo(json_text.dumps(report.to_json()))
    else:
        console.print(_table(report))
        console.print(_footer(report))


@contextmanager
def _progress() -> Iterator[OnRun]:
    """A bar on stderr, nothing where stderr is no terminal."""
    console = error_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # The bar must not take cores from what is measured: two pictures a second are enough.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("opening", total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def _card(manifest: Manifest, split: SplitBytes, options: BenchOptions, backend: BackendOptions) -> Table:
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
    card.add_row("KV", f"{human_bytes(split.kv_per_token())} a token, mean context {context:g}")
    card.add_row("bytes a token", f"plain {human_bytes(plain)}, DMTD {human_bytes(dmtd)}")
    card.add_row("bound", f"{plain / dmtd:.2f}x (what the bytes allow at batch 1)")
    card.add_row(
        "run",
        f"batch {', '.join(map(str, options.batches))}; prompt {options.prompt_len}, {options.max_tokens} new tokens; "
        f"{options.repeats} repeats; {_where(backend)}",
    )
    return card


def _where(backend: BackendOptions) -> str:
    if backend.backend == "onnxruntime":
        return backend.device
    return f"engines of {backend.backend}"


def _table(report: BenchReport) -> Table:
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


def _footer(report: BenchReport) -> Text:
    facts = report.conditions
    load = facts["load_average"]
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    gpu = f"{facts['gpu']}, driver {facts['driver']}; " if facts["gpu"] else ""
    library = facts["tensorrt"] or facts["onnxruntime"]
    lines = [
        f"{gpu}{facts['cpu']}, {facts['cores']:g} cores, {facts['threads']} threads; {library}, "
        f"{facts['dialect']} dialect; dmtd {facts['dmtd']}{commit}",
        f"medians of {facts['repeats']} interleaved repeats; {facts['full_pass']} full pass",
    ]
    if facts["full_pass"] == "fused":
        lines[-1] += f", whose graph repeats D and lm_head: {human_bytes(report.split.fused_extra)} more memory"
    if load is not None and load > 0.5:
        lines.append(
            f"load average {load:.1f} when this began: if other work goes on, rates are lower than the machine can do"
        )
    return Text("\n".join(lines), style="dim")
