"""``dmtd verify``: options, progress and the table. The work is ``dmtd_export.verify``'s."""

from __future__ import annotations

import contextlib
import json as json_text
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dmtd_export.cli_export import LIBRARIES
from dmtd_export.cli_progress import StageDisplay
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


def verify(
    bundle: BundleArgument = None,
    model: BundleOption = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint it was made from: the weights are compared with it too.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="The adapter that was merged into the checkpoint.")] = None,
    level: Annotated[
        Literal["structure", "graphs", "oracle"] | None,
        typer.Option(help="How far to go; by default as far as this machine can."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a bundle: files, graphs against each other, whole cycles against the PyTorch reference.

    Exit code 1 if anything diverges; the first divergence is named.
    """
    directory = pick(bundle, model, "BUNDLE")
    if adapter is not None and checkpoint is None:
        raise typer.BadParameter("--adapter: give the checkpoint it was made of with --checkpoint")
    require("verify", LIBRARIES, '"dmtd[export]"')
    from dmtd_export.verify import render, verify_bundle
    from dmtd_models.checkpoint import open_checkpoint

    with logs_to_stderr(), contextlib.ExitStack() as opened:
        source = opened.enter_context(open_checkpoint(checkpoint, adapter)) if checkpoint is not None else None
        display = opened.enter_context(StageDisplay())
        report = verify_bundle(directory, checkpoint=source, level=level, on_stage=display.verified)
    if json:
        typer.echo(json_text.dumps({"schema": 1, **report.to_json()}))
    else:
        Console(highlight=False).print(render(report))
    if not report.ok:
        note(f"error: {directory} failed verification; first divergence: {report.first_divergence}")
        raise typer.Exit(EXIT_ERROR)
