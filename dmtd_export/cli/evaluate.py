"""``dmtd evaluate``: options, progress, table and plots. The work is ``dmtd_export.evaluate``'s."""

from __future__ import annotations

import json as json_text
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dmtd_errors import at_fault
from dmtd_export.cli.export import LIBRARIES
from dmtd_export.cli.options.evaluate import EvaluateGroup, HarnessGroup, OpenGroup
from dmtd_export.cli.options.export import SplitGroup
from dmtd_export.cli.progress import StageDisplay
from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.options import EvaluateOptions, HarnessOptions, OpenOptions
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.cli.common import JsonOption, logs_to_stderr, note, pick, require

_EXTRA = "evaluate"


def evaluate(
    target: Annotated[
        Path | None, typer.Argument(metavar="MODEL_OR_BUNDLE", help="A checkpoint, or a bundle made by `dmtd export`.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="The same, instead of the argument.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The plain base model: checkpoint or bundle. By default MODEL itself, run plain."),
    ] = None,
    options: EvaluateGroup = EvaluateOptions(),
    harness: HarnessGroup = HarnessOptions(),
    opening: OpenGroup = OpenOptions(),
    split: SplitGroup = SplitOptions(),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for report.json and plots (PNG). By default none are written."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure what a DMTD model keeps of its plain base model.

    On text: perplexity, and how often the likeliest token is the base's, by place in the cycle.

    On prompts: how many tokens are those of the base before the first other one.

    On tasks: accuracy. A checkpoint is scored in PyTorch, a bundle by its own graphs.
    """
    path = pick(target, model, "MODEL_OR_BUNDLE")
    require("evaluate", ("numpy",), _EXTRA)
    from dmtd_export.evaluate import evaluate as run
    from dmtd_export.evaluate.subject import is_bundle, require_there
    from dmtd_export.evaluate.table import render

    require_there(path)
    if base is not None:
        with at_fault("base"):
            require_there(base)
    if output is not None:
        require("evaluate -o", ("matplotlib",), _EXTRA)
        _require_writable(output)  # an evaluation takes long: what it found must not be lost for a wrong name
    if harness.lm_eval:
        require("evaluate --lm-eval", ("lm_eval",), "lm-eval")
    if not is_bundle(path) or (base is not None and not is_bundle(base)):
        require("evaluate", (*LIBRARIES, "torch"), _EXTRA)
    if opening.adapter is not None and base is None:
        base = path
    options = replace(options, harness=harness, open=replace(opening, split=split))
    with logs_to_stderr(), StageDisplay() as display:
        report = run(path, base, options, display.counted)
    found = report.to_json()
    if json:
        typer.echo(json_text.dumps(found))
    else:
        Console(highlight=False).print(render(report))
    if output is not None:  # behind what is shown: a full disk takes the files alone
        from dmtd_export.evaluate.plots import write_plots

        (output / "report.json").write_text(json_text.dumps(found, indent=1) + "\n", encoding="utf-8")
        pictures = write_plots(report, output)
        note(f"written: {output / 'report.json'}" + "".join(f", {picture.name}" for picture in pictures))


def _require_writable(directory: Path) -> None:
    from dmtd_models.checkpoints.saving import make_directory

    if directory.is_file():
        raise EvaluateError(f"{directory} is a file, expected a directory; give another one", param="output")
    make_directory(directory)
    if not os.access(directory, os.W_OK):
        raise EvaluateError(f"{directory} cannot be written to; give another directory", param="output")
