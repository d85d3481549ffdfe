"""A fine-tuning run from a checkpoint and documents to trained weights: the library's entry, `finetune`.

    checkpoint -> plain model (frozen) and student -> stored features -> Trainer -> trained weights

What text becomes documents is ``dmtd_models.data``'s business, what form the result is kept in is ``result``'s. Runs on a
CPU, one GPU, or several processes started by ``accelerate launch``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dmtd_models.checkpoints.adapter import AdaptedCheckpoint
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.checkpoints.saving import make_directory
from dmtd_models.config.model import DmtdSpec
from dmtd_models.errors import ConfigError, ModelError
from dmtd_models.finetune.batches import Batch, Collator, Document, PackedRows, make_batch, pack
from dmtd_models.finetune.cost import flops_per_token, matmul_peak
from dmtd_models.finetune.endings import ending_with_a_state, named_memory_errors
from dmtd_models.finetune.features import FeatureKey, FeatureStore, add_computed, documents_digest, store_features
from dmtd_models.finetune.heap import keep_large_blocks
from dmtd_models.finetune.options import BatchOptions, TrainOptions, check_options, usual_precision
from dmtd_models.finetune.states import latest_checkpoint, remove_states, step_of
from dmtd_models.finetune.student import Student, trainable_model
from dmtd_models.finetune.trainer import DmtdTrainer, Guard, OnLog, set_length, training_arguments
from dmtd_models.progress import Progress, silent
from dmtd_models.reference.dmtd import DmtdModel

_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    student: Student
    steps: int
    tokens: int  # trained on, in all epochs and processes
    seconds: float  # of training; what a restart did again counts once
    peak_flops: float  # measured, of one process
    log: list[dict[str, Any]]


class DocumentTable:
    """Documents of a data set with ``input_ids`` and ``prompt_len``, each with its place among all tokens."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("numpy")
        self.lengths, self.prompt_lens = _lengths(dataset)
        self._first_rows = np.concatenate(([0], np.cumsum(self.lengths))).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        ids = np.asarray(self._dataset[index]["input_ids"], dtype=np.int64)
        return Document(token_ids=ids, prompt_len=self.prompt_lens[index], first_row=self._first_rows[index])

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return int(self._first_rows[-1])

    def learnt_share(self, options: TrainOptions) -> float:
        """Of all tokens, those that are learnt: answers, or whatever follows another token."""
        prompts = [1] * len(self) if options.batch.learn_prompt else [max(1, length) for length in self.prompt_lens]
        return 1 - sum(prompts) / max(1, self.tokens)


def _lengths(dataset: Any) -> tuple[list[int], list[int]]:
    """Tokens, and tokens of the prompt, of each document; token ids stay in the file."""
    import pyarrow.compute

    lengths: list[int] = []
    prompt_lens: list[int] = []
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        lengths += pyarrow.compute.list_value_length(table["input_ids"]).to_pylist()
        prompt_lens += table["prompt_len"].to_pylist()
    return lengths, prompt_lens


def _reached(dataset: Any, options: TrainOptions) -> Any:
    """The documents that a run of ``max_tokens`` reads: of more, a seeded choice, so that nothing is computed for the others."""
    if options.max_tokens is None:
        return dataset
    lengths = np.asarray(_lengths(dataset)[0], dtype=np.int64)
    order = np.random.default_rng(options.seed).permutation(len(lengths))
    count = int(np.searchsorted(np.cumsum(lengths[order]), options.max_tokens)) + 1
    return dataset if count >= len(lengths) else dataset.select(np.sort(order[:count]))


def finetune(
    checkpoint: Checkpoint,
    spec: DmtdSpec,
    train: Any,
    held_out: Any,
    output: Path,
    options: TrainOptions,
    *,
    initial: Checkpoint | None = None,
    cache_dir: Path | None = None,
    device: str | None = None,
    progress: Progress = silent,
    on_log: OnLog = lambda values: None,
) -> RunResult:
    """Train the late layers, all layers or an adapter; go on from the newest state in ``output`` if there is one.

    Args:
        checkpoint: the plain model.
        spec: split, cycle length and convention to train for.
        train: a ``datasets.Dataset`` with ``input_ids`` (at most ``options.tokens_per_step`` each) and ``prompt_len``.
        held_out: the same, for evaluation during training; may be empty.
        output: directory of log and states.
        options: how to train.
        initial: where the trained weights start; the plain model's own by default. It stays the teacher.
        cache_dir: of stored features, ``output/features`` by default.
        device: cpu or cuda; by default cuda where there is one.
        progress: told of stages and how far they are.
        on_log: told of every line of the log.

    Raises:
        ModelError: contradictory options, no text, no room, a loss that is no number, too little memory.
    """
    check_options(options, spec)
    if options.loss.top_k > checkpoint.config.vocab_size:
        raise ConfigError(
            f"got {options.loss.top_k}, expected at most {checkpoint.config.vocab_size} (the vocabulary)", param="top_k"
        )
    options = replace(options, precision=options.precision or usual_precision(device))
    use_cpu = (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu"
    if use_cpu:
        keep_large_blocks()
    documents = DocumentTable(_reached(train, options))
    if not len(documents):
        raise ModelError("training text: got no documents; give other --data or a greater --max-length")
    with named_memory_errors():
        return _finetune(
            checkpoint,
            initial or checkpoint,
            spec,
            documents,
            held_out,
            output,
            options,
            cache_dir,
            use_cpu=use_cpu,
            progress=progress,
            on_log=on_log,
        )


def _finetune(
    checkpoint: Checkpoint,
    initial: Checkpoint,
    spec: DmtdSpec,
    documents: DocumentTable,
    held_out: Any,
    output: Path,
    options: TrainOptions,
    cache_dir: Path | None,
    *,
    use_cpu: bool,
    progress: Progress,
    on_log: OnLog,
) -> RunResult:
    progress("loading the model", 0, 0)
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    base = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, dtype).requires_grad_(False)
    student = _student(initial, base, options)
    rows = pack(documents.lengths, options.tokens_per_step, options.seed)
    make_directory(output)
    # The arguments also start the processes of accelerate: nothing is shared between them before.
    arguments = training_arguments(options, output, use_cpu=use_cpu)
    steps, steps_per_evaluation = _steps(documents, rows, options, arguments.world_size)
    set_length(arguments, options, steps)
    if len(held_out):
        progress("computing what the plain model gives for held-out text", 0, 0)
    evaluation = _held_out(held_out, base.to(arguments.device), student.measured_top_k, options)
    store = None
    if options.cache_features if options.cache_features is not None else use_cpu and bool(options.frozen_layers(spec)):
        with arguments.main_process_first():
            store = _features(checkpoint, base, documents, cache_dir or output / "features", options, progress)
    collator = Collator(spec, options.batch, options.seed, store.add_to if store else lambda batch: None)
    peak = matmul_peak(dtype, arguments.device)
    guard = Guard(options, collator.set_cycle_length, spec.cycle_length, steps_per_evaluation if evaluation else 0)
    trainer = DmtdTrainer(
        student=student,
        options=options,
        arguments=arguments,
        rows=PackedRows(documents, rows),
        collate=collator,
        phases=spec.cycle_length,
        held_out=evaluation,
        flops_per_token=flops_per_token(
            base, options, stored=store is not None, learnt=documents.learnt_share(options)
        ),
        peak_flops=peak,
        on_log=_telling(progress, on_log),
    )
    guard.trainer = trainer
    trainer.add_callback(guard)
    _train(trainer, guard, output, steps, progress)
    return RunResult(
        student=student,
        steps=trainer.state.global_step,
        tokens=trainer.tokens,
        seconds=trainer.seconds,
        peak_flops=peak,
        log=list(trainer.state.log_history),
    )


def _telling(progress: Progress, on_log: OnLog) -> OnLog:
    def told(values: Mapping[str, Any]) -> None:
        if "tokens" in values and "divergence" in values:
            progress("training", int(values["step"]), int(values["steps"]))
        on_log(values)

    return told


def _train(trainer: DmtdTrainer, guard: Guard, output: Path, steps: int, progress: Progress) -> None:
    """To the end, from the newest state in ``output`` if there is one."""
    last = latest_checkpoint(output)
    if trainer.args.should_save:
        remove_states(output, keep=2)  # among them what a kill left half written
    if last is not None and step_of(last) >= steps:
        progress(f"trained already: {last.name} is the last", 0, 0)
        trainer.take_finished(last)  # the trainer would take one step more
        return
    progress("training" if last is None else f"training, from {last.name} on", 0, 0)
    with ending_with_a_state(guard):
        trainer.train(resume_from_checkpoint=str(last) if last else None)


def _student(initial: Checkpoint, base: DmtdModel, options: TrainOptions) -> Student:
    first = options.first_trained_layer(base.spec)
    model: nn.Module = trainable_model(
        base, initial.read, options.trained, first, train_embedding=options.train_embedding
    )
    _require_used(initial, model)
    if options.trained == "lora":
        import peft

        settings = peft.LoraConfig(
            r=options.lora_rank,
            lora_alpha=2 * options.lora_rank,
            target_modules=list(_LORA_TARGETS),
            layers_to_transform=list(range(first, base.config.num_layers)),
            layers_pattern="layers",
        )
        with torch.random.fork_rng(devices=[]):  # the first factors are drawn from torch's own generator
            torch.manual_seed(options.seed)
            model = peft.get_peft_model(model, settings, autocast_adapter_dtype=True)
    return Student(
        model,
        base,
        options.loss,
        frozen_layers=options.frozen_layers(base.spec),
        gradient_checkpointing=options.gradient_checkpointing,
        seed=options.seed,
    )


def _require_used(initial: Checkpoint, model: nn.Module) -> None:
    """Refuse to begin with an adapter part of which would be lost: what is not trained is the base's."""
    if not isinstance(initial, AdaptedCheckpoint):
        return
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    lost = sorted(initial.changed - trained)
    if lost:
        raise ConfigError(
            f"it changes {lost[0]} (and {len(lost) - 1} more), which this run would leave as the base has them; "
            "train what it trained: its --decoding-layers, --train full with its --last-layers, --train-embedding",
            param="initial",
        )


def _steps(documents: DocumentTable, rows: list[list[int]], options: TrainOptions, world: int) -> tuple[int, int]:
    """Steps of the run, and from one evaluation to the next (0: none)."""
    per_step = documents.tokens / len(rows) * options.accumulate * world
    steps = options.epochs * len(rows) / (options.accumulate * world)
    if options.max_tokens is not None:
        steps = options.max_tokens / per_step
    every = round(options.eval_every_tokens / per_step) if options.eval_every_tokens else 0
    return max(1, math.ceil(steps)), max(1, every) if options.eval_every_tokens else 0


def _held_out(dataset: Any, base: DmtdModel, top_k: int, options: TrainOptions) -> list[Batch]:
    """Held-out batches, the same at every evaluation: phases are not moved, and what frozen layers give is computed once."""
    documents = DocumentTable(dataset)
    still = BatchOptions(learn_prompt=options.batch.learn_prompt, vary_phase=False)
    batches = []
    for row in pack(documents.lengths, options.tokens_per_step, options.seed):
        batch = make_batch([documents[index] for index in row], base.spec, still, np.random.default_rng(options.seed))
        add_computed(
            base,
            batch,
            frozen_layers=options.frozen_layers(base.spec),
            top_k=top_k,
            autocast=_autocast(base, options),
        )
        batches.append(batch)
    return batches


def _features(
    checkpoint: Checkpoint,
    base: DmtdModel,
    documents: DocumentTable,
    directory: Path,
    options: TrainOptions,
    progress: Progress,
) -> FeatureStore:
    key = FeatureKey(
        weights=checkpoint_digest(checkpoint, str(options.precision)),
        documents=documents_digest(documents),
        frozen_layers=options.frozen_layers(base.spec),
        top_k=max(options.loss.top_k, 1),
    )
    return store_features(
        base,
        documents,
        directory,
        key,
        row_len=min(4096, options.tokens_per_step),
        autocast=_autocast(base, options),
        on_progress=lambda done, total: progress("computing what frozen layers give", done, total),
    )


def _autocast(base: DmtdModel, options: TrainOptions) -> Callable[[], AbstractContextManager[Any]]:
    device = base.model.norm.weight.device.type
    return lambda: torch.autocast(device, torch.bfloat16, enabled=options.precision == "bfloat16")


def checkpoint_digest(checkpoint: Checkpoint, precision: str) -> str:
    """A digest of a checkpoint's architecture, files and the precision it is computed in."""
    digest = hashlib.sha256(repr((asdict(checkpoint.config), precision)).encode())
    path = checkpoint.path
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
