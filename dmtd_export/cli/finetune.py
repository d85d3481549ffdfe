"""``dmtd finetune``: options, progress and the closing table. The work is ``dmtd_models.finetune``'s."""

from __future__ import annotations

import json as json_text
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from dmtd_export.cli.options.export import SplitGroup
from dmtd_export.cli.progress import StageDisplay
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.cli.common import JsonOption, logs_to_stderr, pick, require

if TYPE_CHECKING:
    from dmtd_models.finetune.self_written import ChatRequest

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "matplotlib")
_TEXT, _LEARN, _RUN = "Text", "What is learnt", "Run"
_STORED = "What frozen layers compute"


def _option(panel: str, text: str, *names: str, **limits: Any) -> Any:
    if "min" in limits:
        limits = {"metavar": "N", **limits}  # typer's own word for a range leaves no room in 80 columns
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)


def finetune(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="BASE", help="The plain model: a Hugging Face directory or a GGUF file.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="The base, instead of the argument.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the result; an interrupted run there goes on.")
    ] = None,
    split: SplitGroup = SplitOptions(),
    initial: Annotated[
        Path | None, _option(_LEARN, "An adapter of BASE to start from; BASE stays the teacher.")
    ] = None,
    data: Annotated[
        list[str] | None,
        _option(_TEXT, "Text: JSON lines, parquet, or a datasets directory. Give it several times."),
    ] = None,
    held_out: Annotated[
        list[str] | None, _option(_TEXT, "Text to evaluate on while training; by default 2% of the documents.")
    ] = None,
    decontaminate: Annotated[
        list[str] | None,
        _option(_TEXT, "Items, chats or texts that will be evaluated on: documents in which they occur are left out."),
    ] = None,
    answer_tokens: Annotated[
        int, _option(_TEXT, "Answer tokens of chats that the base model writes first; 0: none.", min=0)
    ] = 0,
    questions: Annotated[
        Path | None,
        _option(_TEXT, "Of --answer-tokens: prompts to answer (data, or a text with one a line); else it asks itself."),
    ] = None,
    max_length: Annotated[int, _option(_TEXT, "Tokens of a document; longer ones are cut.", min=8)] = 1024,
    learn_prompt: Annotated[
        bool, _option(_TEXT, "Learn prompts too, not the answers alone.", "--learn-prompt/--learn-answers")
    ] = False,
    vary_phase: Annotated[
        bool,
        _option(
            _TEXT, "Begin an answer's first cycle up to a cycle later, anew each epoch.", "--vary-phase/--fixed-phase"
        ),
    ] = True,
    train: Annotated[
        Literal["late", "full", "lora"], _option(_LEARN, "late: the decoding layers; full: all; lora: factors.")
    ] = "late",
    train_embedding: Annotated[bool, _option(_LEARN, "Train embedding and head too.", "--train-embedding")] = False,
    last_layers: Annotated[
        int | None, _option(_LEARN, "With full or lora: how many last layers are trained; by default all.", min=1)
    ] = None,
    lora_rank: Annotated[int, _option(_LEARN, "Rank of the factors.", min=1, max=1024)] = 32,
    distill: Annotated[
        float, _option(_LEARN, "1: learn the base's distribution; 0: next tokens; between: both.", min=0, max=1)
    ] = 1.0,
    top_k: Annotated[
        int, _option(_LEARN, "Likeliest tokens of the base that are learnt; 0: the whole vocabulary.", min=0)
    ] = 32,
    temperature: Annotated[float, _option(_LEARN, "Temperature of both distributions in the distillation.")] = 1.0,
    curriculum: Annotated[
        str | None, _option(_LEARN, "Smaller cycles first: LENGTH:SHARE pairs, as 2:0.2,3:0.5; by default none.")
    ] = None,
    epochs: Annotated[float, _option(_RUN, "Passes over the text.", min=0)] = 1.0,
    max_tokens: Annotated[int | None, _option(_RUN, "Length of the run in tokens, instead of epochs.", min=1)] = None,
    tokens_per_step: Annotated[int, _option(_RUN, "Tokens of a forward pass, of one process.")] = 4096,
    accumulate: Annotated[
        int, _option(_RUN, "Forward passes before the optimiser steps; each counts the same.", min=1)
    ] = 1,
    learning_rate: Annotated[
        float | None, _option(_RUN, "Largest learning rate; by default 1e-3 for late and lora, 3e-4 for full.")
    ] = None,
    schedule: Annotated[
        Literal["warmup_stable_decay", "linear", "cosine"],
        _option(
            _RUN,
            "How the learning rate moves: warmup_stable_decay (the default), linear or cosine.",
            metavar="NAME",
            show_default=False,
        ),
    ] = "warmup_stable_decay",
    warmup: Annotated[float, _option(_RUN, "Share of the run in which the learning rate rises, 0 to 1.")] = 0.03,
    precision: Annotated[
        Literal["bfloat16", "float32"] | None,
        _option(
            _RUN,
            "Type of matrix products and frozen weights: bfloat16 or float32. By default bfloat16 where the device has "
            "instructions for it.",
            metavar="TYPE",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        _option(
            _RUN,
            "Compute activations again in the backward pass: less memory, a third more work.",
            "--gradient-checkpointing",
        ),
    ] = False,
    cache: Annotated[
        bool | None,
        _option(
            _STORED,
            "Store what frozen layers compute, once for all epochs; by default on a CPU where layers are frozen.",
            "--cache/--no-cache",
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None, _option(_STORED, "Directory of what is stored; by default in the output.")
    ] = None,
    eval_every: Annotated[int, _option(_RUN, "Tokens between evaluations; 0: none.", min=0)] = 500_000,
    save_every: Annotated[float, _option(_RUN, "Seconds between saved states.", min=1)] = 300.0,
    device: Annotated[
        Literal["cpu", "cuda"] | None, _option(_RUN, "Where to train; by default cuda where there is one.")
    ] = None,
    threads: Annotated[int | None, _option(_RUN, "CPU threads; by default as PyTorch chooses.", min=1)] = None,
    seed: Annotated[int, _option(_RUN, "Seed of data order, phases and factors.", min=0)] = 0,
    save: Annotated[
        Literal["checkpoint", "adapter", "both"],
        _option(_RUN, "checkpoint: a whole one; adapter: the small difference to the base; both.", metavar="FORM"),
    ] = "checkpoint",
    adapter_bits: Annotated[
        int,
        _option(_RUN, "Bits of a weight's difference in an adapter; a lora's factors are kept whole.", min=3, max=8),
    ] = 8,
    json: JsonOption = False,
) -> None:
    """Train a model for DMTD with the cyclical mask: its plain self teaches it to decode in cycles.

    The result exports as any checkpoint: dmtd export OUTPUT -o BUNDLE, or dmtd export BASE --adapter OUTPUT -o BUNDLE.
    Run the same command again after an interruption, and it goes on from the last saved state. Several GPUs:
    accelerate launch -m dmtd_export.cli finetune ...
    """
    source = pick(checkpoint, model, "BASE")
    if output is None:
        raise typer.BadParameter("-o / --output: missing; name the directory of the result")
    with StageDisplay() as display:
        display.stage("starting", 0)
        with open_checkpoint(source):
            pass  # a wrong name need not wait for the libraries
        require("finetune", LIBRARIES, "train")
        if answer_tokens:
            require("finetune --answer-tokens", ("onnx", "onnxruntime"), "cpu,train")
    import torch

    from dmtd_models.finetune.batches import BatchOptions
    from dmtd_models.finetune.job import TRAINING, Job, run_job
    from dmtd_models.finetune.options import TrainOptions, usual_precision
    from dmtd_models.finetune.record import recorded_precision
    from dmtd_models.finetune.student import LossOptions

    if threads is not None:
        torch.set_num_threads(threads)
    options = TrainOptions(
        trained=train,
        train_embedding=train_embedding,
        last_layers=last_layers,
        lora_rank=lora_rank,
        epochs=epochs,
        max_tokens=max_tokens,
        tokens_per_step=tokens_per_step,
        accumulate=accumulate,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        precision=precision or recorded_precision(output / TRAINING) or usual_precision(device),
        gradient_checkpointing=gradient_checkpointing,
        cache_features=cache,
        curriculum=_curriculum(curriculum),
        eval_every_tokens=eval_every,
        save_every_s=save_every,
        seed=seed,
        loss=LossOptions(distill=distill, top_k=top_k, temperature=temperature),
        batch=BatchOptions(learn_prompt=learn_prompt, vary_phase=vary_phase),
    )
    job = Job(
        base=source,
        output=output,
        split=split,
        initial=initial,
        data=tuple(data or ()),
        held_out=tuple(held_out or ()),
        decontaminate=tuple(decontaminate or ()),
        answer_tokens=answer_tokens,
        questions=questions,
        max_length=max_length,
        save=save,
        adapter_bits=adapter_bits,
        device=device,
        feature_dir=cache_dir,
        train=options,
    )
    with logs_to_stderr(), StageDisplay() as display:
        summary = run_job(job, display, _write_chats)
    if not summary:  # a process beside the first
        return
    if json:
        typer.echo(json_text.dumps(summary))
    else:
        Console(highlight=False).print(_table(summary))


def _write_chats(request: ChatRequest, progress: Callable[[int], None]) -> None:
    from dmtd_export.chats import write_chats

    write_chats(request, progress)


def _curriculum(text: str | None) -> tuple[tuple[int, float], ...]:
    if not text:
        return ()
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(length), float(share)) for length, share in pairs)
    except ValueError:
        raise typer.BadParameter(f"--curriculum: got {text!r}, expected LENGTH:SHARE pairs, as 2:0.2,3:0.5") from None


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
