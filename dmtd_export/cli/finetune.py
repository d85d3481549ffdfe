"""``dmtd finetune``: options, progress and the closing table. The work is ``dmtd_models.finetune``'s."""

from __future__ import annotations

import json as json_text
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dmtd_export.cli.options.export import SplitGroup
from dmtd_export.cli.options.finetune import USUAL, BatchGroup, JobGroup, LossGroup, TrainGroup
from dmtd_export.cli.progress import StageDisplay
from dmtd_models.checkpoints.checkpoint import is_gguf, open_checkpoint
from dmtd_models.config.model import SplitOptions, require_split
from dmtd_runtime.cli.common import JsonOption, logs_to_stderr, pick, require

if TYPE_CHECKING:
    from dmtd_models.finetune.self_written import ChatRequest

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "matplotlib")


def finetune(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="BASE", help="The plain model: a Hugging Face directory or a GGUF file.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="The base, instead of the argument.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the result.")] = None,
    split: SplitGroup = SplitOptions(),
    job: JobGroup = USUAL,
    train: TrainGroup = USUAL.train,
    loss: LossGroup = USUAL.train.loss,
    batch: BatchGroup = USUAL.train.batch,
    json: JsonOption = False,
) -> None:
    """Train a model for DMTD: its plain self teaches it to decode in cycles.

    After an interruption the same command goes on from the last saved state.

    The result exports as any checkpoint: dmtd export OUTPUT -o BUNDLE

    An adapter (--save adapter) exports with its base: dmtd export BASE --adapter OUTPUT -o BUNDLE

    On several GPUs: accelerate launch -m dmtd_export.cli finetune ...
    """
    source = pick(checkpoint, model, "BASE")
    if output is None:
        raise typer.BadParameter("-o / --output: missing; name the directory of the result")
    if job.initial is None and is_gguf(source):
        require_split(split)
    with StageDisplay() as display:
        display.stage("starting", 0)
        with open_checkpoint(source):
            pass  # a wrong name need not wait for the libraries
        require("finetune", LIBRARIES, "train")
        if job.answer_tokens:
            require("finetune --answer-tokens", ("onnx", "onnxruntime"), "cpu,train")
    from dmtd_models.finetune.job import run_job

    job = replace(job, base=source, output=output, split=split, train=replace(train, loss=loss, batch=batch))
    with logs_to_stderr(), StageDisplay() as display:
        summary = run_job(job, display.counted, display.line, _write_chats)
    if not summary:  # a process beside the first
        return
    if json:
        typer.echo(json_text.dumps(summary))
    else:
        Console(highlight=False).print(_table(summary))


def _write_chats(request: ChatRequest, progress: Callable[[int], None]) -> None:
    from dmtd_export.chats import write_chats

    write_chats(request, progress)


def _table(summary: Mapping[str, Any]) -> Table:
    split = summary["split"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("result", f"{summary['output']} ({summary['saved']})")
    table.add_row(
        "split",
        f"E{split['encoding_layers']} T{split['thinking_layers']} D{split['decoding_layers']}, cycle of "
        f"{split['cycle_length']}, origin {split['cycle_origin']}, prompt input {split['prompt_input']}",
    )
    table.add_row("trained", f"{summary['tokens']:,} tokens, {summary['steps']} steps, {summary['seconds']:.0f} s")
    if summary["tokens_per_s"]:
        share = f"{summary['matmul_share']:.0%} of {summary['matmul_peak_flops'] / 1e12:.2f} Tflop/s"
        table.add_row("speed", f"{summary['tokens_per_s']:,.0f} tokens/s; matrix products reach {share}")
    found = summary["evaluation"]
    if found:
        table.add_row("divergence", _phases(found.get("eval_divergence_by_phase"), ".3f"))
        table.add_row("agreement", _phases(found.get("eval_agreement_by_phase"), ".1%"))
    elif not summary["documents"]["held_out"]:
        table.add_row("held out", "no document, so nothing is measured; give --held-out, or 50 documents or more")
    if summary["adapter_relative_error"]:
        table.add_row(
            "adapter",
            f"cut to {summary['adapter_bits']} bits: {summary['adapter_relative_error']:.2%} of the difference is lost",
        )
    adapter = summary["saved"] == "adapter"
    words = [summary["base"], "--adapter", summary["output"]] if adapter else [summary["output"]]
    table.add_row("next", f"dmtd export {shlex.join(words)} -o BUNDLE")
    return table


def _phases(values: list[float | None] | None, form: str) -> str:
    if not values:
        return "not measured"
    from dmtd_models.finetune.job import phases_shown

    shown = phases_shown(values, form)
    return f"head {shown[0]}, late {' / '.join(shown[1:]) or '-'}"
