"""``dmtd evaluate``: options, progress, table and plots. The work is ``dmtd_export.evaluate``'s."""

from __future__ import annotations

import json as json_text
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dmtd_export.cli.export import LIBRARIES
from dmtd_export.cli.options.export import SplitGroup
from dmtd_export.cli.progress import StageDisplay
from dmtd_export.evaluate import EvaluateOptions, HarnessOptions, OpenOptions
from dmtd_export.evaluate.errors import EvaluateError
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.cli.common import JsonOption, logs_to_stderr, note, pick, require

_WHAT, _HOW = "What is measured", "How much, and where"
_DEFAULT = EvaluateOptions()
_EXTRA = "evaluate"


def _what(*names: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_WHAT)


def _how(*names: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_HOW)


def evaluate(
    target: Annotated[
        Path | None, typer.Argument(metavar="MODEL_OR_BUNDLE", help="A checkpoint, or a bundle made by `dmtd export`.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="The same, instead of the argument.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The plain base model: checkpoint or bundle. By default MODEL itself, run plain."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="A directory that `dmtd finetune` made of MODEL. MODEL without it is then the base."),
    ] = None,
    text: Annotated[
        list[str] | None,
        _what(
            "--text",
            text="Held-out text: a text file, or data as --data of finetune takes. May be repeated.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, _what("--task", text="A file of items of your own (.jsonl). May be repeated.")
    ] = None,
    fluency: Annotated[
        bool,
        _what("--fluency", text="Let model and base answer twenty everyday prompts; the base reads both."),
    ] = False,
    compare_conventions: Annotated[
        bool, _what("--compare-conventions", text="Measure every legal convention of a checkpoint; name the best.")
    ] = False,
    offsets: Annotated[
        bool, _what("--offsets", text="Score the text with the first head at every place of a cycle.")
    ] = False,
    lm_eval: Annotated[
        str | None, _what("--lm-eval", text="Tasks of the lm-eval harness, with commas between: arc_easy,gsm8k.")
    ] = None,
    lm_eval_include: Annotated[
        Path | None, _what("--lm-eval-include", text="A directory of further task files for the harness.")
    ] = None,
    lm_eval_chat: Annotated[bool, _what("--lm-eval-chat", text="Render its prompts with the chat template.")] = False,
    run_unsafe_code: Annotated[
        bool,
        _what(
            "--run-unsafe-code",
            text="Let --lm-eval tasks like HumanEval and MBPP run the code that models write, on this machine.",
        ),
    ] = False,
    split: SplitGroup = SplitOptions(),
    max_tokens: Annotated[
        int, _how(text="Tokens of text, all texts together; a window of each at least.")
    ] = _DEFAULT.max_tokens,
    window_len: Annotated[int, _how(text="Tokens of a window of text.")] = _DEFAULT.window_len,
    context_len: Annotated[
        int, _how(text="Tokens of a window that are fed as the prompt and not scored.")
    ] = _DEFAULT.context_len,
    limit: Annotated[int, _how(text="Items of each task.")] = _DEFAULT.limit,
    prefixes: Annotated[int, _how(text="Prefixes continued for run lengths; 0: none.")] = _DEFAULT.prefixes,
    max_run: Annotated[int, _how(text="Tokens at which a run length is cut off.")] = _DEFAULT.max_run,
    seed: Annotated[int, _how(text="Seed of every draw: windows, prefixes, items, bootstrap.")] = _DEFAULT.seed,
    dtype: Annotated[
        Literal["float32", "bfloat16"], _how(text="Type of a checkpoint in memory; a bundle has its own.")
    ] = _DEFAULT.open.dtype,
    device: Annotated[Literal["cpu", "cuda"], _how(text="Where to run.")] = _DEFAULT.open.device,
    threads: Annotated[
        int | None, _how(text="CPU threads; by default one for each core this process may use.")
    ] = _DEFAULT.open.threads,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", hidden=True)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for report.json and plots (PNG).")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure what a DMTD model keeps of its plain base model.

    Perplexity and top-1 agreement by phase on held-out text, run lengths against plain greedy decoding, and tasks. A
    checkpoint is scored in PyTorch, a bundle by its own graphs; both give the same numbers.
    """
    path = pick(target, model, "MODEL_OR_BUNDLE")
    if cache_dir is not None:
        raise typer.BadParameter(
            "--cache-dir: has gone, for texts and tasks are files and nothing is downloaded; leave it out"
        )
    require("evaluate", ("numpy",), _EXTRA)
    from dmtd_export.evaluate import evaluate as run
    from dmtd_export.evaluate.subject import is_bundle
    from dmtd_export.evaluate.table import render

    if not is_bundle(path) or (base is not None and not is_bundle(base)):
        require("evaluate", (*LIBRARIES, "torch"), _EXTRA)
    if output is not None:
        require("evaluate -o", ("matplotlib",), _EXTRA)
        _require_writable(output)  # an evaluation takes long: what it found must not be lost for a wrong name
    if lm_eval is not None:
        require("evaluate --lm-eval", ("lm_eval",), "lm-eval")
    if adapter is not None and base is None:
        base = path
    options = EvaluateOptions(
        texts=tuple(text or ()),
        tasks=tuple(task or ()),
        max_tokens=max_tokens,
        window_len=window_len,
        context_len=context_len,
        limit=limit,
        prefixes=prefixes,
        max_run=max_run,
        seed=seed,
        fluency=fluency,
        compare_conventions=compare_conventions,
        offsets=offsets,
        harness=HarnessOptions(
            tasks=tuple(name.strip() for name in (lm_eval or "").split(",") if name.strip()),
            include=lm_eval_include,
            chat=lm_eval_chat,
        ),
        run_unsafe_code=run_unsafe_code,
        open=OpenOptions(split=split, adapter=adapter, device=device, dtype=dtype, threads=threads),
        base_open=OpenOptions(device=device, dtype=dtype, threads=threads),
    )
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
        raise EvaluateError(f"-o {directory}: is a file, expected a directory; give another one")
    make_directory(directory)
    if not os.access(directory, os.W_OK):
        raise EvaluateError(f"-o {directory}: cannot be written to; give another directory")
