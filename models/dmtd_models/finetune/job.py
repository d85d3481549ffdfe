"""One ``dmtd finetune`` from its options to its result: text, training, what is kept. The command line's and a script's entry.

    base + sources -> documents -> ``run.finetune`` -> checkpoint or adapter, curves, summary

The output directory:

    training/          job.json, log.jsonl, states to go on from, stored features, curves.png
    summary.json       what was trained and how it went
    config.json ...    the checkpoint, or adapter_config.json and adapter_model.safetensors
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from dmtd_models.cache import default_cache_dir
from dmtd_models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dmtd_models.checkpoints.delta import MOST_BITS
from dmtd_models.checkpoints.saving import make_directory, write_json
from dmtd_models.checkpoints.weight_files import ADAPTER_CONFIG
from dmtd_models.config.model import DmtdSpec, resolve_dmtd
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.read_data import ReadOptions
from dmtd_models.errors import ConfigError
from dmtd_models.finetune.claim import claimed
from dmtd_models.finetune.curves import MOST_PHASES, draw_curves, read_log
from dmtd_models.finetune.data import RunText, read_run_text, text_digest
from dmtd_models.finetune.options import Job, check_options, usual_precision
from dmtd_models.finetune.probes import read_probes
from dmtd_models.finetune.record import recorded_options, recorded_precision, require_same_run, write_record
from dmtd_models.finetune.result import save_adapter, save_checkpoint
from dmtd_models.finetune.run import RunResult, checkpoint_digest, finetune
from dmtd_models.finetune.self_written import ChatRequest, ChatWriter
from dmtd_models.finetune.states import latest_checkpoint
from dmtd_models.finetune.trainer import LOG
from dmtd_models.progress import Progress, silent

TRAINING, SUMMARY = "training", "summary.json"


def run_job(
    job: Job,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
    write_chats: ChatWriter | None = None,
) -> dict[str, Any]:
    """Do it all; returns what summary.json holds (empty in processes beside the first).

    ``say`` takes lines for a reader. ``write_chats`` lets the base write text: ``dmtd_export.chats.write_chats``.

    Raises:
        ModelError: anything wrong with base, options, text, memory or the course of training, in one line.
    """
    _require_own_output(job)
    job, training = _on_this_machine(job), job.output / TRAINING
    with contextlib.ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(job.base))
        initial = opened.enter_context(open_checkpoint(job.base, job.initial)) if job.initial is not None else None
        spec = _spec(checkpoint, initial, job)
        check_options(job.train, spec)
        processes = PartialState(cpu=job.device == "cpu" or not torch.cuda.is_available())
        record = _record(checkpoint, spec, job, processes.num_processes)
        require_same_run(training, record)
        tokenizer = TextTokenizer.of_checkpoint(checkpoint)
        # One process writes and tokenises, the others find it done.
        with processes.main_process_first():
            text = _text(checkpoint, spec, tokenizer, job, progress, say, write_chats)
            record["documents"] = [len(text.train), len(text.held_out)]
            record["text"] = text_digest(text.train)
            if processes.is_main_process:
                make_directory(training)
                wait = "wait until it has ended, or give another -o"
                opened.enter_context(claimed(training, f"-o {job.output}", wait))
            require_same_run(training, record)
            if processes.is_main_process:
                write_record(training, record)
        for note in text.notes:
            say(note)
        with _telling_where_to_go_on(training, say):
            result = finetune(
                checkpoint,
                spec,
                text.train,
                text.held_out,
                training,
                job.train,
                initial=initial,
                cache_dir=job.feature_dir,
                device=job.device,
                progress=progress,
                on_log=lambda values: _say_evaluation(values, say),
            )
        if not processes.is_main_process:
            return {}
        progress("saving", 0, 0)
        error = _save(checkpoint, spec, result, job)
    summary = _summary(job, spec, text, result, error)
    write_json(job.output / SUMMARY, summary)
    draw_curves(read_log(training / LOG), training / "curves.png")
    return summary


@contextlib.contextmanager
def _telling_where_to_go_on(training: Path, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        last = latest_checkpoint(training)
        if last is not None:
            say(f"saved: {last}; the same command goes on from there")
        raise


def _on_this_machine(job: Job) -> Job:
    """The job with the precision that it has here; threads are set."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("got cuda, but torch finds no GPU; use cpu, or install torch's CUDA build", param="device")
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    precision = job.train.precision or recorded_precision(job.output / TRAINING) or usual_precision(job.device)
    return replace(job, train=replace(job.train, precision=precision))


def _require_own_output(job: Job) -> None:
    """Refuse to write over a model that is not this command's."""
    if job.output.resolve() == job.base.resolve():
        raise ConfigError(
            f"{job.output} is the base itself, which would be lost; give another directory", param="output"
        )
    if job.output.is_file():
        raise ConfigError(f"{job.output} is a file, expected a directory; give another place", param="output")
    if job.initial is not None and job.output.resolve() == job.initial.resolve():
        raise ConfigError(
            f"{job.output} is the adapter of --initial, which would be lost; give another directory", param="output"
        )
    for name, kind in (("config.json", "a model"), (ADAPTER_CONFIG, "an adapter")):
        if (job.output / name).is_file() and not (job.output / TRAINING).is_dir():
            raise ConfigError(
                f"{job.output} holds {kind} that dmtd finetune did not make there; give another directory",
                param="output",
            )


def _record(checkpoint: Checkpoint, spec: DmtdSpec, job: Job, processes: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "base": checkpoint_digest(checkpoint, "any precision"),
        "initial": None if job.initial is None else str(job.initial.resolve()),
        "split": asdict(spec),
        "data": list(job.data),
        "held_out": list(job.held_out),
        "decontaminate": list(job.decontaminate),
        "answer_tokens": job.answer_tokens,
        "questions": None if job.questions is None else str(job.questions),
        "max_length": job.max_length,
        "train": recorded_options(asdict(job.train)) | {"learning_rate": job.train.peak_learning_rate},
        "processes": processes,
    }


def _spec(checkpoint: Checkpoint, initial: Checkpoint | None, job: Job) -> DmtdSpec:
    """The split and convention to train for: the options', and what they leave open as the adapter to start from has it."""
    if checkpoint.dmtd is not None:
        raise ConfigError(f"{job.base}: is a DMTD checkpoint already; fine-tuning starts from the plain model")
    if job.adapter_bits != MOST_BITS and (job.save == "checkpoint" or job.train.trained == "lora"):
        raise ConfigError(
            "has no effect on a checkpoint or a lora's factors; give --save adapter with --train late or full",
            param="adapter_bits",
        )
    if job.questions is not None and not job.answer_tokens:
        raise ConfigError("has no effect without --answer-tokens; leave it out, or give that", param="questions")
    if job.feature_dir is not None and job.train.cache_features is False:
        raise ConfigError("has no effect with --no-cache; leave one of them out", param="feature_dir")
    if job.initial is not None and job.train.trained == "lora":
        raise ConfigError("an adapter's factors are made anew in a lora run; use --train late or full", param="initial")
    spec = resolve_dmtd(checkpoint.config, None if initial is None else initial.dmtd, job.split)
    # It is what the weights are going to be trained for; those of the base are for none.
    return replace(spec, trained=False, convention_recorded=True)


def _text(
    checkpoint: Checkpoint,
    spec: DmtdSpec,
    tokenizer: TextTokenizer,
    job: Job,
    progress: Progress,
    say: Callable[[str], None],
    write_chats: ChatWriter | None,
) -> RunText:
    probes = read_probes(job.decontaminate)
    sources = list(job.data)
    if job.answer_tokens:
        if write_chats is None:
            raise ConfigError("answer_tokens: nobody to write them; give run_job dmtd_export.chats.write_chats")
        sources.append(str(_answers(checkpoint, tokenizer, job, progress, write_chats)))
    progress("reading text", 0, 0)
    longest = min(job.max_length, job.train.tokens_per_step, checkpoint.config.max_positions)
    if longest < job.max_length:
        bound = "--tokens-per-step" if longest == job.train.tokens_per_step else "the model takes no more"
        say(f"documents have at most {longest} tokens: {bound}")
    options = ReadOptions(max_length=longest, cycle_origin=spec.cycle_origin)
    return read_run_text(
        sources, job.held_out, tokenizer, options, default_cache_dir(), probes=probes, seed=job.train.seed
    )


def _answers(
    checkpoint: Checkpoint, tokenizer: TextTokenizer, job: Job, progress: Progress, write_chats: ChatWriter
) -> Path:
    directory = job.output / TRAINING / "answers"
    progress("writing chats", 0, job.answer_tokens)
    write_chats(
        ChatRequest(
            base=job.base,
            tokenizer=tokenizer,
            directory=directory,
            answer_tokens=job.answer_tokens,
            longest=min(checkpoint.config.max_positions, job.max_length),  # what is longer would be cut
            questions=job.questions,
            seed=job.train.seed,
            device="cuda" if job.device != "cpu" and torch.cuda.is_available() else "cpu",
            precision=usual_precision(job.device),
            threads=torch.get_num_threads(),
        ),
        lambda tokens: progress("writing chats", min(tokens, job.answer_tokens), job.answer_tokens),
    )
    return directory


def phases_shown(values: Sequence[float | None], form: str) -> list[str]:
    """Numbers by phase for people: "-" where no token was, and of a long cycle the first."""
    shown = ["-" if value is None else format(value, form) for value in values[:MOST_PHASES]]
    return [*shown, "..."] if len(values) > MOST_PHASES else shown


def _say_evaluation(values: Mapping[str, Any], say: Callable[[str], None]) -> None:
    if "eval_divergence" not in values:
        return

    def shown(name: str, form: str) -> str:
        return " / ".join(phases_shown(values.get(name, []), form))

    say(
        f"{values['eval_tokens']:,} tokens: held-out divergence by phase {shown('eval_divergence_by_phase', '.3f')}, "
        f"agreement {shown('eval_agreement_by_phase', '.1%') or 'not measured'}"
    )


def _save(checkpoint: Checkpoint, spec: DmtdSpec, result: RunResult, job: Job) -> float | None:
    error = None
    if job.save in ("adapter", "both"):
        error = save_adapter(checkpoint, spec, result.student, job.output, job.adapter_bits)
    if job.save in ("checkpoint", "both"):
        save_checkpoint(checkpoint, spec, result.student, job.output)
    return error


def _summary(job: Job, spec: DmtdSpec, text: RunText, result: RunResult, error: float | None) -> dict[str, Any]:
    evaluations = [line for line in result.log if "eval_divergence" in line]
    training = [line for line in result.log if "tokens_per_s" in line]
    rates = sorted(line["tokens_per_s"] for line in training)
    return {
        "schema": 1,
        "base": str(job.base),
        "initial": str(job.initial) if job.initial else None,
        "output": str(job.output),
        "saved": job.save,
        "adapter_bits": job.adapter_bits if error else None,
        "split": asdict(spec),
        "options": asdict(job.train) | {"learning_rate": job.train.peak_learning_rate},
        "text": list(text.notes),
        "documents": {"train": len(text.train), "held_out": len(text.held_out)},
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "tokens_per_s": rates[len(rates) // 2] if rates else None,
        "matmul_peak_flops": result.peak_flops,
        "matmul_share": sorted(line["matmul_share"] for line in training)[len(training) // 2] if training else None,
        "evaluation": {key: value for key, value in evaluations[-1].items() if key.startswith("eval_")}
        if evaluations
        else None,
        "adapter_relative_error": error,
    }
