"""``dmtd verify``: options, progress and the table. The work is ``dmtd_export.verify``'s."""

from __future__ import annotations

import contextlib
import json as json_text
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dmtd_errors import at_fault
from dmtd_export.cli.export import LIBRARIES
from dmtd_export.cli.progress import StageDisplay
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.cli.common import (
    EXIT_ERROR,
    BundleArgument,
    BundleOption,
    JsonOption,
    logs_to_stderr,
    note,
    pick,
    require,
)
from dmtd_runtime.cli.options.backend import BACKEND
from dmtd_runtime.cli.options.groups import option

VerifyBackend = Annotated[BackendOptions, BACKEND.only("backend", "device", "device_id", "full_pass")]


def verify(
    bundle: BundleArgument = None,
    model: BundleOption = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The checkpoint it was made from, to compare its weights too. By default they are not."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="With --checkpoint: the adapter that was merged into it. By default none.")
    ] = None,
    level: Annotated[
        Literal["structure", "graphs", "oracle"] | None,
        typer.Option(help="How far to go. By default as far as this machine can: oracle needs torch."),
    ] = None,
    backend: VerifyBackend = BackendOptions(),
    max_num_seqs: Annotated[
        int | None,
        option(
            "On a device: the largest batch that is checked. By default what the bundle was exported for, at most 8.",
            panel="Backend",
            min=1,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a bundle: files, graphs against each other, whole cycles against the PyTorch reference.

    With --backend tensorrt, tensorrt-rtx or simulator, or --device cuda: what that device computes, against the reference.

    Exit code 1 if anything diverges. The first divergence is named.
    """
    directory = pick(bundle, model, "BUNDLE")
    if adapter is not None and checkpoint is None:
        raise typer.BadParameter("--adapter: give the checkpoint it was made of with --checkpoint")
    on_device = backend.runs_engines or backend.device == "cuda"
    given = {
        "--max-num-seqs": max_num_seqs is not None,
        "--full-pass": backend.full_pass is not None,
    }
    if (names := [name for name, was_given in given.items() if was_given]) and not on_device:
        raise typer.BadParameter(
            f"{', '.join(names)}: for a device, not for the bundle; say which: --backend tensorrt or --device cuda"
        )
    if on_device and (checkpoint is not None or level is not None):
        raise typer.BadParameter("--checkpoint and --level are for the bundle, not for a device; leave them out")
    require("verify", LIBRARIES, "export")
    from dmtd_export.verify import largest_batch, render, verify_bundle, verify_on_device
    from dmtd_models.checkpoints.checkpoint import open_checkpoint

    with logs_to_stderr(), contextlib.ExitStack() as opened:
        display = opened.enter_context(StageDisplay())
        source = None
        if checkpoint is not None:
            with at_fault("checkpoint"):
                source = opened.enter_context(open_checkpoint(checkpoint, adapter))
        if on_device:
            batch = max_num_seqs or largest_batch(load_manifest(directory))
            report = verify_on_device(directory, replace(backend, max_num_seqs=batch), progress=display.verified)
        else:
            report = verify_bundle(directory, checkpoint=source, level=level, progress=display.verified)
    if json:
        typer.echo(json_text.dumps({"schema": 1, **report.to_json()}))
    else:
        Console(highlight=False).print(render(report))
    if not report.ok:
        note(f"error: {directory} failed verification; first divergence: {report.first_divergence}")
        raise typer.Exit(EXIT_ERROR)
