"""Whole runs over a tiny model: they learn, they go on exactly where they stopped, they stop when numbers end."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import RUN_LENGTHS, interrupted_at, run_options, run_tiny, write_base
from safetensors.numpy import load_file
from torch import Tensor

from dmtd_models.errors import ModelError
from dmtd_models.finetune.batches import Collator
from dmtd_models.finetune.options import LossOptions, usual_precision
from dmtd_models.finetune.states import latest_checkpoint
from dmtd_models.finetune.student import Student
from dmtd_models.finetune.trainer import DivergedError

FACTORS = {"trained": "lora", "lora_rank": 2, "accumulate": 2, "gradient_checkpointing": True}
KINDS: dict[str, dict[str, Any]] = {
    "late, stored features": {},
    "factors, two rows a step, layers computed twice": FACTORS,
    "the same in bfloat16": {**FACTORS, "precision": "bfloat16"},
    "full, curriculum": {"trained": "full", "curriculum": ((1, 0.3), (2, 0.7))},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("run") / "base")


def weights(student: Student) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.named_parameters() if value.requires_grad}


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole_runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Tensor], int]]:
    """Weights and steps of a run of some kind that nothing interrupts, made once."""
    done: dict[str, tuple[dict[str, Tensor], int]] = {}

    def run(kind: str) -> tuple[dict[str, Tensor], int]:
        if kind not in done:
            output = tmp_path_factory.mktemp("whole")
            result = run_tiny(base, output, run_options(**KINDS[kind]))
            done[kind] = weights(result.student), result.steps
        return done[kind]

    return run


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="names x86's instruction sets")
def test_bfloat16_only_where_the_cpu_computes_it() -> None:
    flags = re.search("^flags.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags
    has = {"avx512bw", "avx512vl", "avx512dq"} <= set(flags[0].split()) or "avx_ne_convert" in flags[0]
    assert usual_precision("cpu") == ("bfloat16" if has else "float32")


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_it_learns(base: Path, tmp_path: Path, precision: str) -> None:
    options = run_options(epochs=8.0, eval_every_tokens=400, save_every_s=1e9, precision=precision)
    result = run_tiny(base, tmp_path, options)
    found = lines(tmp_path)
    held_out = [line["eval_divergence"] for line in found if "eval_divergence" in line]
    training = [line["divergence"] for line in found if "divergence" in line]
    assert len(held_out) > 5 and len(training) == result.steps
    assert np.mean(training[-5:]) < 0.6 * np.mean(training[:3]), "the tiny model learns its own documents"
    last = next(line for line in reversed(found) if "eval_divergence" in line)
    assert len(last["eval_divergence_by_phase"]) == 3 and len(last["eval_agreement_by_phase"]) == 3
    per_epoch = sum(length for length, _ in RUN_LENGTHS)
    assert result.tokens == 8 * per_epoch == [line["tokens"] for line in found if "tokens" in line][-1]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{result.steps}"]


@pytest.mark.parametrize(
    ("kind", "share"),
    [  # "late" goes on in the tests of Ctrl-C and of half-written states as well
        pytest.param(kind, share, id=kind, marks=[] if KINDS[kind] is FACTORS else pytest.mark.slow)
        for kind, share in zip(KINDS, (0.35, 0.8, 0.8, 0.35), strict=True)
    ],
)
def test_an_interrupted_run_ends_with_the_same_weights(
    base: Path, tmp_path: Path, kind: str, share: float, whole_runs: Any
) -> None:
    """Bit for bit, on one CPU thread: weights, optimiser, schedule, order, phases and samples go on as they were."""
    expected, steps = whole_runs(kind)
    step = round(share * steps)

    def interrupt() -> None:
        raise KeyboardInterrupt

    options = run_options(**KINDS[kind])
    with pytest.raises(KeyboardInterrupt):
        run_tiny(base, tmp_path, options, hooks=interrupted_at(step, interrupt))
    assert latest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step - 1}"
    result = run_tiny(base, tmp_path, options)
    assert result.steps == steps
    assert same(weights(result.student), expected)
    assert sorted({line["step"] for line in lines(tmp_path)}) == list(range(1, steps + 1))


def test_ctrl_c_saves_the_step_at_work(base: Path, tmp_path: Path, whole_runs: Any) -> None:
    expected, _ = whole_runs("late, stored features")
    options = run_options(save_every_s=1e9)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(base, tmp_path, options, hooks=interrupted_at(5, lambda: signal.raise_signal(signal.SIGINT)))
    assert signal.getsignal(signal.SIGINT) is before
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert same(weights(run_tiny(base, tmp_path, options).student), expected)


def test_a_request_to_end_saves_too(base: Path, tmp_path: Path) -> None:
    hooks = interrupted_at(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        run_tiny(base, tmp_path, run_options(save_every_s=1e9), hooks=hooks)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_a_half_written_state_is_passed_over(base: Path, tmp_path: Path, whole_runs: Any) -> None:
    expected, _ = whole_runs("late, stored features")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiny(base, tmp_path, run_options(), hooks=interrupted_at(6, interrupt))
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"half")  # complete.json knows its size
    (tmp_path / "checkpoint-90").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    result = run_tiny(base, tmp_path, run_options())
    assert same(weights(result.student), expected)
    names = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert names == {f"checkpoint-{result.steps - 1}", f"checkpoint-{result.steps}"}


def test_nothing_is_computed_for_text_that_a_short_run_never_reads(base: Path, tmp_path: Path) -> None:
    totals = set()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "computing what frozen layers give":
            totals.add(total)

    result = run_tiny(base, tmp_path, run_options(max_tokens=300, cache_features=True), hooks={"progress": progress})
    [total] = totals
    assert result.tokens >= 300
    assert 300 <= total < 300 + max(length for length, _ in RUN_LENGTHS)


def test_a_finished_run_is_finished(base: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    first = run_tiny(base, tmp_path, run_options(max_tokens=300))
    file = tmp_path / f"checkpoint-{first.steps}" / "complete.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 1000.0}))
    again = run_tiny(
        base, tmp_path, run_options(max_tokens=300), hooks={"progress": lambda stage, *_: stages.append(stage)}
    )
    assert first.steps == again.steps and first.tokens == again.tokens
    assert stages[-1] == f"trained already: checkpoint-{first.steps} is the last"
    assert again.seconds == pytest.approx(1000, abs=5.0)
    assert same(weights(first.student), weights(again.student))


def test_time_before_a_restart_counts(base: Path, tmp_path: Path) -> None:
    hooks = interrupted_at(5, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_tiny(base, tmp_path, run_options(), hooks=hooks)
    file = tmp_path / "checkpoint-6" / "complete.json"
    record = json.loads(file.read_text())
    assert record["seconds"] > 0
    file.write_text(json.dumps({**record, "seconds": 1000.0}))
    assert 1000 < run_tiny(base, tmp_path, run_options()).seconds < 1100


def test_saved_files_are_as_readable_as_any(base: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        run_tiny(base, tmp_path, run_options(max_tokens=100))
    finally:
        os.umask(old)
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in saved)
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved} == {0o640}


def at_call(monkeypatch: pytest.MonkeyPatch, call: int, spoil: Callable[[Student, Any], Any]) -> None:
    """Let ``spoil`` change the result of the student's ``call``-th forward pass."""
    whole, calls = Student.forward, []

    def forward(self: Student, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        result = whole(self, *args, **kwargs)
        return spoil(self, result) if len(calls) == call else result

    monkeypatch.setattr(Student, "forward", forward)


def nan_loss(student: Student, result: Any) -> Any:
    result.loss.data.fill_(float("nan"))
    return result


def infinite_gradient(student: Student, result: Any) -> Any:
    # In one weight only, and not the first: clipping makes all others 0.
    norm = student.get_parameter("model.model.norm.weight")
    norm.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    return result


@pytest.mark.parametrize(("spoil", "what"), [(nan_loss, "the loss"), (infinite_gradient, "a gradient")])
def test_a_number_that_is_none_stops_the_run_and_the_last_state_stays_good(
    base: Path, tmp_path: Path, whole_runs: Any, spoil: Any, what: str
) -> None:
    expected, _ = whole_runs("late, stored features")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, 6, spoil)
        with pytest.raises(DivergedError, match=f"{what} is not a number at step 5; .*checkpoint-5; ") as error:
            run_tiny(base, tmp_path, run_options())
    assert "\n" not in str(error.value)
    assert same(weights(run_tiny(base, tmp_path, run_options()).student), expected)


def test_a_weight_that_is_no_number_is_never_saved(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students: list[Student] = []
    at_call(monkeypatch, 1, lambda student, result: students.append(student) or result)

    def poison() -> None:
        students[0].get_parameter("model.model.norm.weight").data[3] = float("nan")

    with pytest.raises(DivergedError, match=r"a weight is not a number at step 4; .*checkpoint-3"):
        run_tiny(base, tmp_path, run_options(), hooks=interrupted_at(4, poison))
    last = latest_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-3"
    assert all(np.isfinite(value).all() for value in load_file(last / "model.safetensors").values())


def test_a_base_with_a_poisoned_weight_is_said_at_once(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    poisoned = write_base(tmp_path / "base")
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, poisoned / "model.safetensors")
    with pytest.raises(DivergedError, match="at step 0; no state was saved yet"):
        run_tiny(poisoned, tmp_path / "run", run_options())
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def test_the_curriculum_moves_at_its_steps(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    whole = Collator.__call__

    def recorded(self: Collator, rows: Any) -> Any:
        batch = whole(self, rows)
        seen.append((self.spec.cycle_length, int(batch["phase"].max()) + 1))
        return batch

    monkeypatch.setattr(Collator, "__call__", recorded)
    options = run_options(
        epochs=2.0, curriculum=((2, 0.25), (3, 0.5)), eval_every_tokens=60, loss=LossOptions(distill=0, vocab_sample=0)
    )
    result = run_tiny(base, tmp_path, options, cycle=4)
    n = result.steps
    expected = [2 if step / n < 0.25 else 3 if step / n < 0.5 else 4 for step in range(n)]
    assert len(set(expected)) == 3
    assert [length for length, _ in seen] == expected
    assert [phases for _, phases in seen] == expected
    found = lines(tmp_path)
    assert all(len(line["eval_agreement_by_phase"]) == 4 for line in found if "eval_agreement" in line)
    first = next(line for line in found if "divergence" in line)
    assert first["divergence_by_phase"][2:] == [None, None]


def test_phases_move_with_the_epoch(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[list[int]]] = {}
    whole = Collator.__call__

    def recorded(self: Collator, rows: Any) -> Any:
        batch = whole(self, rows)
        seen.setdefault(rows[0].index, []).append(batch["gate_hidden"].tolist())
        return batch

    monkeypatch.setattr(Collator, "__call__", recorded)
    run_tiny(base, tmp_path, run_options(epochs=2.0, save_every_s=1e9))
    assert all(len(gates) == 2 for gates in seen.values())
    assert sum(first != second for first, second in seen.values()) > len(seen) / 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), "cpu"])
def test_exhausted_memory_says_what_to_lower(base: Path, tmp_path: Path, error: Any) -> None:
    if error == "cpu":
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")

    def exhausted(student: Student, result: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, 3, exhausted)
        with pytest.raises(ModelError, match=r"training: out of memory .*lower --tokens-per-step") as found:
            run_tiny(base, tmp_path, run_options())
    assert "\n" not in str(found.value)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_bug_is_not_taken_for_exhausted_memory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(student: Student, result: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    at_call(monkeypatch, 2, bug)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_tiny(base, tmp_path, run_options())


@pytest.mark.parametrize("writer", ["weights", "optimiser"])
def test_a_full_disk_keeps_the_state_before(base: Path, tmp_path: Path, whole_runs: Any, writer: str) -> None:
    from safetensors import SafetensorError

    expected, _ = whole_runs("late, stored features")
    with pytest.MonkeyPatch.context() as patch:
        full = []

        def fill() -> None:
            full.append(1)

        if writer == "weights":
            from dmtd_models.finetune import trainer

            save = trainer.save_file

            def failing(state: Any, file: Path, *args: Any) -> None:
                if full:
                    raise SafetensorError("I/O error: No space left on device (os error 28)")
                save(state, file, *args)

            patch.setattr(trainer, "save_file", failing)
        else:
            dump = torch.save

            def failing_dump(*args: Any, **kwargs: Any) -> None:
                if full:
                    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
                dump(*args, **kwargs)

            patch.setattr(torch, "save", failing_dump)
        with pytest.raises(ModelError, match=r"checkpoint-5: the state cannot be saved .*make room.*checkpoint-4"):
            run_tiny(base, tmp_path, run_options(), hooks=interrupted_at(5, fill))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert same(weights(run_tiny(base, tmp_path, run_options()).student), expected)
