"""``dmtd bench``: measure, and print tables or one JSON object. ``dmtd_runtime.bench`` measures, ``bench_tables.py`` draws."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.bench.load import LoadOptions
from dmtd_runtime.bench.measure import BenchOptions, OnRun, check_options, run_bench
from dmtd_runtime.bench.serve import check_load, run_serve
from dmtd_runtime.bench.serve_plot import check_rates, draw_latency
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.bundle.speed_bound import split_bytes
from dmtd_runtime.cli.bench_tables import card, footer, serve_footer, serve_table, table
from dmtd_runtime.cli.common import BundleArgument, BundleOption, JsonOption, error_console, pick, require
from dmtd_runtime.cli.options.backend import BenchBackend
from dmtd_runtime.cli.options.bench import BenchGroup
from dmtd_runtime.cli.options.load import PANEL, Load
from dmtd_runtime.cli.options.serving import Many
from dmtd_runtime.errors import RequestError
from dmtd_runtime.serving.options import ServingOptions

_LOAD = LoadOptions()
Number = TypeVar("Number", int, float)


def bench(
    bundle: BundleArgument = None,
    model: BundleOption = None,
    options: BenchGroup = BenchOptions(),
    serve: Annotated[
        bool, typer.Option("--serve", help="Bring sequences to a worker as clients would.", rich_help_panel=PANEL)
    ] = False,
    request_rates: Annotated[
        str,
        typer.Option(
            "--request-rate",
            help="Sequences a second (Poisson), one or a list: 1,2,4. inf: all at once.",
            rich_help_panel=PANEL,
        ),
    ] = ",".join(map(str, _LOAD.request_rates)),
    load: Load = _LOAD,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw latency over the request rates: FILE.png or .svg.", rich_help_panel=PANEL),
    ] = None,
    serving: Many = ServingOptions(),
    backend: BenchBackend = BackendOptions(),
    json: JsonOption = False,
) -> None:
    """Measure plain and DMTD decoding, interleaved on the same weights and prompts.

    Prompts are random token ids, decoding is greedy, and no sequence ends early.

    The numbers are medians over the repeats.

    With --serve sequences come and go: throughput and latency of continuous batching, beside those of a static batch.
    """
    directory = pick(bundle, model, "BUNDLE")
    load = replace(load, request_rates=_numbers(request_rates, float, "request_rates"))
    if not serve and (load != _LOAD or serving != ServingOptions() or plot is not None):
        raise RequestError("an option of a serving load was given without it; add --serve", param="serve")
    manifest = open_bundle(directory)
    console = Console(highlight=False)
    if serve:
        _serve(directory, manifest, options, load, backend, serving, plot=plot, console=None if json else console)
    else:
        _batches(directory, manifest, options, backend, None if json else console)


def _batches(
    directory: Path, manifest: Manifest, options: BenchOptions, backend: BackendOptions, console: Console | None
) -> None:
    """Static batches; JSON where there is no console."""
    check_options(options, manifest, backend)
    if console:
        console.print(card(manifest, split_bytes(manifest), options, backend))
    with _progress() as on_run:
        report = run_bench(directory, manifest, options, backend, on_run=on_run)
    if console:
        console.print(table(report))
        console.print(footer(report))
    else:
        typer.echo(json_text.dumps(report.to_json()))


def _serve(
    directory: Path,
    manifest: Manifest,
    options: BenchOptions,
    load: LoadOptions,
    backend: BackendOptions,
    serving: ServingOptions,
    *,
    plot: Path | None,
    console: Console | None,
) -> None:
    """Serving loads; JSON where there is no console."""
    if options.whole_model:
        raise RequestError("got it with --serve, expected one of the two", param="whole_model")
    if plot is not None:
        check_rates(load.request_rates, plot)
        require("bench --plot", ("matplotlib",), "evaluate")
    check_load(directory, manifest, options, load, backend)
    with _progress() as on_run:
        report = run_serve(directory, manifest, options, load, backend, serving, on_run=on_run)
    if console:
        console.print(serve_table(report))
        console.print(serve_footer(report))
    else:
        typer.echo(json_text.dumps(report.to_json()))
    if plot is not None:
        draw_latency(report.loads, plot)


def _numbers(text: str, kind: Callable[[str], Number], param: str) -> tuple[Number, ...]:
    try:
        return tuple(kind(each) for each in text.split(","))
    except ValueError:
        raise RequestError(f"got {text!r}, expected numbers with commas, such as 1,2,4", param=param) from None


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
