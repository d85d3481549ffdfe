"""One run of transformers' Trainer over a ``Student``: what is logged, when it is saved, when it must stop.

Stands under ``run``, which prepares model and data. Here nothing is read from a checkpoint of a model and nothing is exported. A
run's directory:

    log.jsonl              one JSON object a line: training every few steps, evaluation, events
    checkpoint-<step>/     trained weights (safetensors), optimiser, schedule, random state; ``complete.json`` is written last
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dmtd_models.checkpoints.saving import replacing, write_json
from dmtd_models.errors import CheckpointError, ModelError
from dmtd_models.finetune.batches import Batch
from dmtd_models.finetune.heap import GIVE_BACK_EVERY_STEPS, give_back
from dmtd_models.finetune.options import TrainOptions
from dmtd_models.finetune.states import COMPLETE, SIZES, file_sizes, latest_checkpoint, remove_states
from dmtd_models.finetune.student import StepResult, Student

WEIGHTS = "model.safetensors"
LOG = "log.jsonl"
OnLog = Callable[[Mapping[str, float]], None]


class DivergedError(ModelError):
    """The loss or a gradient is no longer a number. The last saved state is good."""


class PhaseMeans:
    """Sums by phase on the device, read seldom."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, phase: Tensor, phases: int) -> None:
        """Add values [r] to the sums of their phases, of which there are ``phases`` at most; -1, a prompt's rows, comes first."""
        sums = torch.zeros(2, phases + 1, dtype=torch.float64, device=values.device)
        sums[0].index_add_(0, phase + 1, values.double())
        sums[1].index_add_(0, phase + 1, torch.ones_like(values, dtype=torch.float64))
        known = self._sums.get(name)
        self._sums[name] = sums if known is None else known + sums

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Means over all rows of cycles (``name``) and by phase (``name_by_phase``; ``name_prompt`` for prompts); then empty."""
        out: dict[str, Any] = {}
        for name, sums in self._sums.items():
            total, count = reduce(sums).cpu().tolist()
            inside = sum(count[1:])
            if inside:
                out[name] = sum(total[1:]) / inside
                out[f"{name}_by_phase"] = [t / c if c else None for t, c in zip(total[1:], count[1:], strict=True)]
            if count[0]:
                out[f"{name}_prompt"] = total[0] / count[0]
        self._sums.clear()
        return out


class DmtdTrainer(Trainer):
    """Trainer with our loss, our log and small checkpoints. Batches come from ``batches.Collator``."""

    def __init__(
        self,
        *,
        student: Student,
        options: TrainOptions,
        arguments: TrainingArguments,
        rows: torch.utils.data.Dataset[Any],
        collate: Callable[[Any], Batch],
        phases: int,
        held_out: Sequence[Batch],
        flops_per_token: float,
        peak_flops: float,
        on_log: OnLog = lambda values: None,
    ) -> None:
        super().__init__(model=student, args=arguments, train_dataset=rows, data_collator=_as_they_are)
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)  # prints its own form of every log line
        self._options = options
        self._collate = collate
        self._phases = phases
        self._held_out = held_out
        self._means = PhaseMeans()
        self._tokens = 0  # of this process since the start of the run
        self._window = (time.monotonic(), 0)
        self._before = 0.0  # seconds of training before this process
        self._started = time.monotonic()
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._on_log = on_log
        self._log_file = Path(arguments.output_dir) / LOG

    def begin_step(self, step: int) -> None:
        """Let what a step draws at random hang on its number alone, so that a resumed run draws the same."""
        self.accelerator.unwrap_model(self.model).seed_sampling(step)

    def agreed(self, *wishes: bool) -> list[bool]:
        """Each wish, if any process has it: saving takes all of them, and their clocks differ."""
        if self.args.world_size == 1:
            return list(wishes)
        told = torch.tensor(wishes, dtype=torch.float32, device=self.args.device)
        return [value > 0 for value in self.accelerator.reduce(told, reduction="sum").tolist()]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Make the batch where it is used: the loader reads ahead, past the step at which a curriculum moves on."""
        return super()._prepare_inputs(self._collate(inputs["rows_of_step"]) if "rows_of_step" in inputs else inputs)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        result, phase = _forward(model, inputs, held_out=False)
        if not bool(torch.isfinite(result.loss)):
            raise DivergedError(self.diverged("the loss"))
        self._means.add("divergence", result.divergence, phase, self._phases)
        self._means.add("label_loss", result.label_loss, phase, self._phases)
        self._tokens += len(inputs["input_ids"])
        return (result.loss, result) if return_outputs else result.loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs:
            seconds, tokens = time.monotonic() - self._window[0], self._tokens - self._window[1]
            self._window = (time.monotonic(), self._tokens)
            world = self.args.world_size
            rate = world * tokens / max(seconds, 1e-9)
            logs["tokens"] = world * self._tokens
            logs["tokens_per_s"] = round(rate, 1)
            logs["matmul_share"] = round(rate * self._flops_per_token / (self._peak_flops * world), 4)
            logs.update(self._means.read(lambda sums: self.accelerator.reduce(sums)))
        super().log(logs, start_time)
        if self.is_world_process_zero():
            line = json.dumps({"step": self.state.global_step, "time": round(time.time(), 1), **logs})
            with self._log_file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        self._on_log({"step": self.state.global_step, "steps": self.state.max_steps, **logs})

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Means over the held-out batches, by phase. They are few: each process computes them all, and none waits.

        Their divergence is from the plain model's 32 likeliest tokens under every objective; that in the lines of training is
        from what the run learns, and compares with runs of the same objective alone.
        """
        self.model.eval()
        means = PhaseMeans()
        for batch in self._held_out:
            with self.compute_loss_context_manager():
                result, phase = _forward(self.model, self._prepare_inputs(dict(batch)), held_out=True)
            means.add("divergence", result.divergence, phase, self._phases)
            means.add("label_loss", result.label_loss, phase, self._phases)
            if result.agrees is not None:
                means.add("agreement", result.agrees, phase, self._phases)
        self.model.train()
        values = {f"{metric_key_prefix}_{key}": value for key, value in means.read(lambda sums: sums).items()}
        values[f"{metric_key_prefix}_tokens"] = self.args.world_size * self._tokens
        self.log(values)
        self._window = (time.monotonic(), self._tokens)
        return values

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Only what was trained, without pickled arguments."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        state = trained_state(self.accelerator.unwrap_model(self.model))
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise DivergedError(self.diverged("a weight"))
        with replacing(directory / WEIGHTS) as part:
            save_file(state, part)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))
        record = json.loads((Path(resume_from_checkpoint) / COMPLETE).read_text(encoding="utf-8"))
        self._tokens = record["tokens"] // self.args.world_size
        self._before = record["seconds"]
        self._started = time.monotonic()
        self._window = (self._started, self._tokens)

    def take_finished(self, checkpoint: Path) -> None:
        """Take the weights and the log of a run that has ended, in place of training."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Older states go when the new one is whole, not before: a kill at any moment leaves one to go on from."""
        output = Path(self.args.output_dir)
        directory = output / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, CheckpointError) as error:  # torch's writer calls a full disk a RuntimeError
            if isinstance(error, torch.OutOfMemoryError):
                raise
            last = latest_checkpoint(output)
            raise ModelError(
                f"{directory}: the state cannot be saved ({str(error).strip().splitlines()[0]}); make room, then run the same "
                f"command again to go on from {last.name if last else 'the start'}"
            ) from error
        if self.args.should_save:
            record = {"step": self.state.global_step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
            write_json(directory / COMPLETE, {**record, SIZES: file_sizes(directory)})
            remove_states(output, keep=2)

    @property
    def tokens(self) -> int:
        """Trained on since the start of the run, in all processes."""
        return self.args.world_size * self._tokens

    @property
    def seconds(self) -> float:
        """Spent on training since the start of the run; what a restart did again counts once."""
        return self._before + time.monotonic() - self._started

    def diverged(self, what: str) -> str:
        """The line about a loss, gradient or weight that is no number."""
        last = latest_checkpoint(Path(self.args.output_dir))
        found = f"training: {what} is not a number at step {self.state.global_step}"
        if last is None:
            return f"{found}; no state was saved yet; lower --learning-rate or raise --warmup, and look at the base's weights"
        return (
            f"{found}; the last good state is {last}; run the same command again to go on from there, "
            "or give another -o with a lower --learning-rate"
        )


class Guard(TrainerCallback):
    """Saves by the clock, evaluates, moves the curriculum on, and stops before a step with a gradient that is no number."""

    def __init__(
        self,
        options: TrainOptions,
        set_cycle_length: Callable[[int], None],
        final_cycle_length: int,
        steps_per_evaluation: int,
    ) -> None:
        self._options = options
        self._steps_per_evaluation = steps_per_evaluation
        self._set_cycle_length = set_cycle_length
        self._final = final_cycle_length
        self._saved_at = time.monotonic()
        self.trainer: DmtdTrainer | None = None
        self.stop_signal: int | None = None  # set by a handler: save after this step, and end
        self.stopped = False  # it did, in this process or another

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.trainer is not None, "the guard is given its trainer before training starts"
        self.trainer.begin_step(state.global_step)
        share = state.global_step / max(state.max_steps, 1)
        lengths = [cycle for cycle, until in self._options.curriculum if share < until]
        self._set_cycle_length(lengths[0] if lengths else self._final)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The loader tells its data set of epochs too, but not in several processes, nor after a restart within an epoch.
        assert self.trainer is not None, "the guard is given its trainer before training starts"
        self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # All of them: clipping spreads a NaN over every gradient, but an infinite one makes the others 0.
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            assert self.trainer is not None, "the guard is given its trainer before training starts"
            raise DivergedError(self.trainer.diverged("a gradient"))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The trainer asks a second time at the end of an epoch, and at the last step both are true.
        at_end = state.global_step >= state.max_steps
        every = self._steps_per_evaluation
        control.should_evaluate = bool(every) and (at_end or state.global_step % every == 0)
        assert self.trainer is not None, "the guard is given its trainer before training starts"
        late = time.monotonic() - self._saved_at >= self._options.save_every_s
        late, self.stopped = self.trainer.agreed(late, self.stop_signal is not None)
        control.should_save = at_end or self.stopped or late
        control.should_training_stop = control.should_training_stop or self.stopped
        if self.trainer.args.device.type == "cpu" and state.global_step % GIVE_BACK_EVERY_STEPS == 0:
            give_back()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = False

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()


def training_arguments(options: TrainOptions, output: Path, *, use_cpu: bool) -> TrainingArguments:
    """Our options in the words of transformers."""
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.peak_learning_rate,
        lr_scheduler_type=options.schedule,
        weight_decay=options.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=options.clip,
        optim="adamw_torch_fused",
        bf16=options.precision == "bfloat16",
        use_cpu=use_cpu,
        seed=options.seed,
        data_seed=options.seed,
        logging_strategy="steps",
        logging_steps=options.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="no",  # by Guard, over batches of our own
        save_strategy="steps",
        save_steps=10**9,  # by the clock: see Guard
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=not use_cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
    )
    # One process, one GPU: the trainer would split a batch over all it sees, and documents cannot be split so.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def set_length(arguments: TrainingArguments, options: TrainOptions, steps: int) -> None:
    """Set the number of steps, and what of the schedule hangs on it."""
    arguments.max_steps = steps
    arguments.warmup_steps = min(math.ceil(options.warmup * steps), steps - 1)  # the first has rate 0: not the only one
    if options.schedule == "warmup_stable_decay":
        arguments.lr_scheduler_kwargs = {"num_decay_steps": math.ceil(options.decay * steps), "decay_type": "1-sqrt"}


def trained_state(student: Student) -> dict[str, Tensor]:
    """The trained parameters by name, on the CPU."""
    return {
        name: value.detach().cpu().contiguous() for name, value in student.named_parameters() if value.requires_grad
    }


def load_trained(student: Student, checkpoint: Path) -> None:
    """Take a saved state's weights.

    Raises:
        ModelError: the state is of a run that trained other parameters.
    """
    saved = load_file(checkpoint / WEIGHTS)
    own = {name: value for name, value in student.named_parameters() if value.requires_grad}
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        raise ModelError(
            f"{checkpoint}: its weights are of another run (other layers or another kind of training); "
            "give another -o, or the options of that run"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])


def _as_they_are(rows: Sequence[Any]) -> dict[str, Any]:
    """What the loader collates: nothing yet."""
    return {"rows_of_step": list(rows)}


def _forward(model: Any, inputs: Batch, *, held_out: bool) -> tuple[StepResult, Tensor]:
    inputs = dict(inputs)
    phase = inputs.pop("phase")
    inputs.pop("rows", None)
    return model(**inputs, report_agreement=held_out, comparable=held_out), phase
