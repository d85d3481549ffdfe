"""``dmtd doctor``: what this machine offers and what is installed."""

from __future__ import annotations

import typer
from rich.console import Console

from dmtd_runtime.cli import doctor_facts as facts
from dmtd_runtime.cli.common import EXIT_ERROR, JsonOption


def doctor(json: JsonOption = False) -> None:
    """Say what is installed, what is missing, and the command that closes each gap.

    Exit code 1 if there is a problem (something broken or too old that the runtime needs), 0 if there are only gaps.
    """
    report = facts.collect()
    if json:
        typer.echo(facts.to_json(report))
    else:
        Console(highlight=False).print(facts.render(report))
    if report.problems:
        raise typer.Exit(EXIT_ERROR)
