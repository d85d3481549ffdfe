"""``dmtd build``: options, progress and the closing table. The work is ``dmtd_export.engines.run``'s."""

from __future__ import annotations

import json as json_text
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dmtd_errors.words import counted
from dmtd_export.cli.export import LIBRARIES
from dmtd_export.cli.options.build import BuildGroup
from dmtd_export.cli.progress import StageDisplay
from dmtd_export.engines.options import BuildOptions
from dmtd_runtime.bundle.engine_record import EngineRecord, oldest_capability
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.cli.common import (
    EXIT_ERROR,
    BundleArgument,
    BundleOption,
    JsonOption,
    human_bytes,
    logs_to_stderr,
    note,
    pick,
    require,
)

if TYPE_CHECKING:
    from dmtd_export.engines.plan import Target
    from dmtd_export.engines.run import BuildResult, Preview


def build(
    bundle: BundleArgument = None,
    model: BundleOption = None,
    options: BuildGroup = BuildOptions(),
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Verify the engines on this machine's device, where it has one, before they take their place.",
        ),
    ] = True,
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up/--no-warm-up",
            help="With tensorrt-rtx: compile all kernels at the end, where this machine's GPU can run the engines.",
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built and what it takes, and build nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Build TensorRT engines from a bundle into BUNDLE/engines/.

    TensorRT-RTX builds without a GPU, for any of compute capability 8.0 and later.

    TensorRT builds for the GPU of this machine.
    """
    directory = pick(bundle, model, "BUNDLE")
    require("build", LIBRARIES, "export")
    from dmtd_export.engines.run import build_engines, preview
    from dmtd_export.engines.warm_up import compiles_here, warm_up_engines
    from dmtd_export.verify import engines_hook

    console = Console(highlight=False)
    if dry_run:
        with logs_to_stderr():
            seen = preview(directory, options)
        if json:
            typer.echo(json_text.dumps(_preview_json(seen)))
        else:
            console.print(_preview_table(seen))
        return
    started = time.monotonic()
    with logs_to_stderr(), StageDisplay() as display:
        hook = engines_hook(progress=display.verified) if verify else None
        result = build_engines(
            directory, options, progress=display.counted, on_ready=lambda seen: note(_statement(seen)), verify=hook
        )
        cold = ""
        if warm_up and result.built and compiles_here(result.record):
            display.stage("compiling kernels", 0)
            cold = warm_up_engines(directory, result.directory, result.record)
    if cold:
        note(f"kernels are compiled when the engines first run, not now: {cold}")
    _tell(directory, result, time.monotonic() - started, json=json)


def _tell(directory: Path, result: BuildResult, seconds: float, *, json: bool) -> None:
    """What came of a build that took ``seconds`` in all; an error where its verification did not run to its end."""
    from dmtd_export.verify import FAILED, SKIPPED

    found = result.record.verification if result.built else {}
    if reason := found.get(SKIPPED):
        note(f"not verified: {reason}; where it can be done run: {_verify_command(directory, result.record)}")
    if json:
        typer.echo(json_text.dumps(_result_json(result, seconds)))
    else:
        Console(highlight=False).print(_result_table(result, seconds))
    if reason := found.get(FAILED):
        note(f"error: built, but verification did not run to its end: {reason}")
        raise typer.Exit(EXIT_ERROR)


def _statement(seen: Preview) -> str:
    """One line before a build: what it takes."""
    return f"building {counted(len(seen.parts), 'engine')} for {seen.target.label}: {_takes(seen)}"


def _takes(seen: Preview) -> str:
    memory = f"{human_bytes(seen.peak_bytes)} of memory, " if seen.peak_bytes else ""
    return f"up to {memory}{human_bytes(seen.disk_bytes)} of disk"


def _preview_json(seen: Preview) -> dict[str, Any]:
    return {
        "schema": 1,
        "dry_run": True,
        "directory": str(seen.directory),
        "exists": seen.exists,
        "backend": seen.target.backend,
        "version": seen.target.version,
        "compute_capability": seen.target.compute_capability,
        "dtype": seen.dtype,
        "capacity": seen.plan.capacity,
        "length_buckets": list(seen.plan.length_buckets),
        "batch_buckets": list(seen.plan.batch_buckets),
        "engines": [
            {
                "graph": part.graph.name,
                "weight_bytes": part.weight_bytes,
                "profiles": [profile.name for profile in part.profiles],
                "expected_peak_bytes": part.expected_peak_bytes,
            }
            for part in seen.parts
        ],
        "tables_bytes": seen.tables_bytes,
        "extra_bytes": seen.extra_bytes,
        "expected_peak_bytes": seen.peak_bytes,
        "expected_disk_bytes": seen.disk_bytes,
    }


def _preview_table(seen: Preview) -> Table:
    table = _table()
    _row(table, "would build", str(seen.directory))
    if seen.exists:
        _row(table, "", "stands there already; --force builds it again", "yellow")
    _row(
        table,
        "for",
        f"{seen.target.backend} {seen.target.version}, {_gpu(seen.target, seen.bundle)}, {seen.dtype}",
    )
    _row(table, "sizes", _sizes(seen.plan.max_num_seqs, seen.plan.max_model_len, seen.plan.length_buckets))
    for part in seen.parts:
        names = ", ".join(profile.name for profile in part.profiles)
        _row(table, part.graph.name, f"{human_bytes(part.weight_bytes)} of weights; profiles {names}")
    _row(table, "on the device", f"{human_bytes(seen.tables_bytes)} of tables beside the engines, held once")
    if seen.extra_bytes:
        _row(table, "", f"{human_bytes(seen.extra_bytes)} of weights stand in more than one engine")
    _row(table, "takes", _takes(seen))
    return table


def _result_json(result: BuildResult, seconds: float) -> dict[str, Any]:
    record = result.record
    return {
        "schema": 1,
        "dry_run": False,
        "directory": str(result.directory),
        "built": result.built,
        "backend": record.backend,
        "version": record.version,
        "compute_capability": record.compute_capability,
        "dtype": record.dtype,
        "capacity": record.capacity,
        "length_buckets": list(record.length_buckets),
        "batch_buckets": list(record.batch_buckets),
        "engines": [
            {
                "graph": engine.graph,
                "file": engine.file,
                "bytes": engine.bytes,
                "weight_bytes": engine.weight_bytes,
                "scratch_bytes": engine.scratch_bytes,
                "seconds": engine.seconds,
                "peak_bytes": engine.peak_bytes,
                "profiles": [profile.name for profile in engine.profiles],
            }
            for engine in record.engines
        ],
        "verification": dict(record.verification),
        "peak_bytes": record.build.peak_bytes,
        "seconds": record.build.seconds,
        "total_seconds": round(seconds, 3),
    }


def _result_table(result: BuildResult, seconds: float) -> Table:
    record, table = result.record, _table()
    _row(table, "engines", str(result.directory))
    if not result.built:
        _row(table, "", "stood there already; --force builds them again", "yellow")
    _row(
        table,
        "for",
        f"{record.backend} {record.version}, {_gpu(record, result.directory.parents[1])}, {record.dtype}",
    )
    _row(table, "sizes", _sizes(record.max_num_seqs, record.max_model_len, record.length_buckets))
    for engine in record.engines:
        scratch = "" if engine.scratch_bytes is None else f", {human_bytes(engine.scratch_bytes)} of activations"
        weights = f"{human_bytes(engine.weight_bytes)} of weights"
        _row(table, engine.graph, f"{human_bytes(engine.bytes)}, {weights}{scratch}; {engine.seconds:.1f} s")
    alone = f"{record.build.seconds:.1f} s, {human_bytes(record.build.peak_bytes)} of memory"
    _row(table, "took", f"{seconds:.1f} s, building alone {alone}" if result.built else alone)
    if record.verification.get("ok"):
        checks = record.verification["checks"]
        _row(table, "verified", f"{counted(len(checks), 'check')} against the float32 oracle", "green")
    else:
        _row(table, "verified", f"no; check them with: {_verify_command(result.bundle, record)}", "yellow")
    if record.backend == "simulator":
        _row(table, "", "graphs for ONNX Runtime on the CPU: no engine, no speed", "yellow")
    return table


def _verify_command(bundle: Path, record: EngineRecord) -> str:
    from dmtd_export.verify import largest_batch

    built = record.max_num_seqs
    fewer = f" --max-num-seqs {built}" if built < largest_batch(load_manifest(bundle)) else ""
    return f"dmtd verify {shlex.quote(str(bundle))} --backend {record.backend}{fewer}"


def _gpu(made_for: Target | EngineRecord, bundle: Path) -> str:
    if made_for.backend == "simulator":
        return "the CPU"
    return (
        f"any GPU of compute capability {oldest_capability(load_manifest(bundle))} and later"
        if made_for.compute_capability == "any"
        else f"GPU {made_for.compute_capability}"
    )


def _sizes(max_num_seqs: int, max_model_len: int, buckets: tuple[int, ...]) -> str:
    lengths = ", ".join(map(str, buckets))
    return f"batch 1 to {max_num_seqs}, up to {max_model_len} tokens, attention over {lengths} cache rows"


def _table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _row(table: Table, name: str, text: str, style: str = "") -> None:
    table.add_row(name, Text(text, style=style))
