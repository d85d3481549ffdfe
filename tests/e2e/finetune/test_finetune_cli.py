"""``dmtd finetune`` as a user meets it: its result, its machine-readable form, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_cli import QUICK, SPLIT, dmtd, error_line, finetune, write_lines
from safetensors.numpy import load_file

from dmtd_export.cli.main import VERBS, _LazyCommand
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.reference.testing import write_tiny_checkpoint
from study.report import SUMMARY as SUMMARY_OF_THE_STUDY

SUMMARY_KEYS = {
    *("schema", "base", "initial", "output", "saved", "evaluation", "adapter_bits", "adapter_relative_error"),
    *SUMMARY_OF_THE_STUDY,
}


def test_defaults_are_those_of_the_library() -> None:
    from dmtd_models.finetune.options import Job

    given = {each.name: each.default for each in _LazyCommand("finetune", VERBS["finetune"]).load().params}
    job = Job(base=Path(), output=Path())
    parts = (job, job.split, job.train, job.train.loss, job.train.batch)
    library = {each.name: getattr(part, each.name) for part in parts for each in fields(part)}
    compared = given.keys() & library.keys() - {"base", "output"}
    assert {name: given[name] or None for name in compared} == {name: library[name] or None for name in compared}
    assert len(compared) >= 40


@pytest.fixture(scope="module")
def finished(base: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with everything kept: directory and what ``--json`` told."""
    output = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        result = finetune(base, output, chats, "--held-out", chats, "--save", "both", "--epochs", "2", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return output, json.loads(result.stdout)


def test_what_a_run_leaves(finished: tuple[Path, dict[str, Any]], base: str, chats: str) -> None:
    output, told = finished
    assert told.keys() == SUMMARY_KEYS and told["schema"] == 1
    assert told == json.loads((output / "summary.json").read_text())
    assert told["base"] == base and told["output"] == str(output) and told["saved"] == "both"
    split = ("encoding_layers", "thinking_layers", "decoding_layers", "cycle_length", "cycle_origin", "prompt_input")
    assert [told["split"][name] for name in split] == [0, 2, 2, 3, "prompt", "thinking"]
    assert told["documents"] == {"train": 12, "held_out": 12}
    assert told["options"]["learning_rate"] == 1e-3, "what was used, though it was not given"
    assert told["options"]["tokens_per_step"] == 128 and told["options"]["loss"]["top_k"] == 4
    assert len(told["evaluation"]["eval_divergence_by_phase"]) == 3
    assert len(told["evaluation"]["eval_agreement_by_phase"]) == 3
    assert 0 < told["adapter_relative_error"] < 0.05 and told["tokens_per_s"] > 0
    training = output / "training"
    assert (training / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in log) == told["steps"]
    assert any(chats in note for note in told["text"])
    assert f"{chats}: held out, but trained on too; numbers on it tell nothing" in told["text"]


def test_the_result_is_a_checkpoint_and_an_adapter(finished: tuple[Path, dict[str, Any]], base: str) -> None:
    output, _ = finished
    raw = json.loads((output / "config.json").read_text())
    assert raw["model_type"] == "mtpqwen3" and raw["mtp_horizon"] == 3
    with open_checkpoint(output) as tuned, open_checkpoint(Path(base), output) as adapted:
        assert tuned.dmtd == adapted.dmtd
        name = "model.layers.3.mlp.up_proj.weight"
        one, other, plain = (np.asarray(source.read(name)) for source in (tuned, adapted, adapted._base))
        change = np.abs(one - plain).max()
        assert change > 0 and np.abs(one - other).max() < 0.02 * change


def test_the_result_exports(finished: tuple[Path, dict[str, Any]], base: str, tmp_path: Path) -> None:
    output, _ = finished
    options = ("--max-num-seqs", "1", "--max-model-len", "64", "--no-verify", "--json")
    result = dmtd("export", str(output), "-o", str(tmp_path / "b"), *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dmtd_trained"] is True
    assert "warning" not in result.stderr


def test_a_run_for_people(base: str, chats: str, tmp_path: Path) -> None:
    output = tmp_path / "my first"
    result = finetune(base, output, chats, "--save", "adapter", "--max-tokens", "200")
    assert result.exit_code == 0, (result.output, result.exception)
    words = " ".join(result.stdout.split())
    assert "E0 T2 D2, cycle of 3" in words
    assert "held out no document, so nothing is measured; give --held-out" in words
    assert not (output / "config.json").exists()
    # The table folds long lines, so without white space: the next command can be pasted.
    shown = "".join(result.stdout.split())
    assert shown.endswith("".join(f"next dmtd export {base} --adapter {shlex.quote(str(output))} -o BUNDLE".split()))


def test_a_long_cycle_is_told_in_short(base: str, chats: str, tmp_path: Path) -> None:
    more = ("--cycle-length", "200", "--held-out", chats, "--max-tokens", "200", "--save", "adapter")
    result = finetune(base, tmp_path / "out", chats, *more)
    assert result.exit_code == 0, (result.output, result.exception)
    [divergence] = re.findall("divergence +head (.*?)agreement", result.stdout, re.DOTALL)
    assert divergence.split()[-1] == "..." and divergence.count("/") == 15


def weights(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "model.safetensors")


def test_ctrl_c_and_the_same_command_again(
    base: str, chats: str, tmp_path: Path, at_forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--epochs", "2", "--eval-every", "0")
    whole = finetune(base, tmp_path / "whole", chats, *command)
    assert whole.exit_code == 0, (whole.output, whole.exception)
    at_forward(3, lambda: signal.raise_signal(signal.SIGINT))
    result = finetune(base, tmp_path / "out", chats, *command)
    assert result.exit_code == 130, (result.output, result.exception)
    assert "interrupted" in result.stderr and "Traceback" not in result.output
    assert "checkpoint-3;thesamecommandgoesonfromthere" in "".join(result.stderr.split()), "lines are wrapped"
    assert (tmp_path / "out" / "training" / "checkpoint-3" / "complete.json").is_file()
    assert not (tmp_path / "out" / "config.json").exists()

    refused = finetune(base, tmp_path / "out", chats, *command, "--learning-rate", "0.0006")
    line = error_line(refused)
    assert "--learning-rate: got 0.0006" in line and "0.001" in line and "another -o" in line
    assert "--cycle-length" in error_line(
        finetune(base, tmp_path / "out", chats, *command, quick=(*QUICK, "--cycle-length", "2"))
    )
    assert "--data" in error_line(finetune(base, tmp_path / "out", chats, *command, "--data", chats))

    result = finetune(base, tmp_path / "out", chats, *command, "--learning-rate", "0.001")  # the default, by name
    assert result.exit_code == 0, (result.output, result.exception)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    # What changes no weight may change: a finished run is saved in another form without training again.
    again = finetune(base, tmp_path / "out", chats, *command, "--save", "adapter", "--eval-every", "1000")
    assert again.exit_code == 0, (again.output, again.exception)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("began", "found"),
    [("float32", "bfloat16"), pytest.param("bfloat16", "float32", marks=pytest.mark.slow)],
)
def test_a_run_goes_on_in_its_own_precision_on_another_machine(
    base: str, chats: str, tmp_path: Path, at_forward: Any, monkeypatch: pytest.MonkeyPatch, began: str, found: str
) -> None:
    quick = (*SPLIT, "--tokens-per-step", "128", "--top-k", "4", "--device", "cpu", "--epochs", "1", "--json")
    monkeypatch.setattr("dmtd_models.finetune.job.usual_precision", lambda device: began)
    at_forward(3, lambda: signal.raise_signal(signal.SIGINT))
    assert finetune(base, tmp_path / "out", chats, quick=quick).exit_code == 130
    monkeypatch.setattr("dmtd_models.finetune.job.usual_precision", lambda device: found)
    line = error_line(finetune(base, tmp_path / "out", chats, "--precision", found, quick=quick))
    assert "--precision" in line and began in line
    result = finetune(base, tmp_path / "out", chats, quick=quick)
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["options"]["precision"] == began
    # No state, nothing to keep to.
    result = finetune(base, tmp_path / "other", chats, quick=quick)
    assert json.loads(result.stdout)["options"]["precision"] == found


def test_other_text_in_a_file_of_the_same_name_is_refused(base: str, tmp_path: Path, at_forward: Any) -> None:
    """As many documents, other words: the run would go on with text that it did not begin with."""
    data = tmp_path / "d.jsonl"
    write_lines(data, *({"text": f"The number {number} is even or odd."} for number in range(12)))
    at_forward(3, lambda: signal.raise_signal(signal.SIGINT))
    command = ("--epochs", "3", "--eval-every", "0")
    assert finetune(base, tmp_path / "out", str(data), *command).exit_code == 130
    before = data.read_text()
    data.write_text(before.replace("even", "evil"))
    line = error_line(finetune(base, tmp_path / "out", str(data), *command))
    assert "--data" in line and "another -o" in line
    data.write_text(before)  # the same again, though the file is younger
    result = finetune(base, tmp_path / "out", str(data), *command)
    assert result.exit_code == 0, (result.output, result.exception)


def test_two_runs_never_share_an_output(base: str, chats: str, tmp_path: Path, at_forward: Any) -> None:
    told = []
    at_forward(2, lambda: told.append(error_line(finetune(base, tmp_path / "out", chats))))
    result = finetune(base, tmp_path / "out", chats)
    assert result.exit_code == 0, (result.output, result.exception)
    [line] = told
    assert "another process is at work in" in line and "another -o" in line


def test_other_options_before_any_state_are_welcome(base: str, chats: str, tmp_path: Path, at_forward: Any) -> None:
    def exhausted() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    at_forward(1, exhausted)
    line = error_line(finetune(base, tmp_path / "out", chats))
    assert "out of memory" in line and "--tokens-per-step" in line
    result = finetune(base, tmp_path / "out", chats, "--max-tokens", "100", "--accumulate", "2")
    assert result.exit_code == 0, (result.output, result.exception)


def test_a_loss_that_is_no_number_is_one_line(base: str, chats: str, tmp_path: Path, at_forward: Any) -> None:
    from dmtd_models.finetune.trainer import DivergedError

    def diverge() -> None:
        raise DivergedError("training: the loss is not a number at step 3")

    at_forward(2, diverge)
    assert "not a number" in error_line(finetune(base, tmp_path / "out", chats))


@pytest.mark.parametrize(
    ("quick", "words"),
    [
        (("--cycle-length", "3"), "--decoding-layers"),
        (("--decoding-layers", "2"), "--cycle-length"),
        (("--decoding-layers", "4", "--cycle-length", "3"), "DMTD split"),
        (("--decoding-layers", "9", "--cycle-length", "3"), "DMTD split"),
        (("--decoding-layers", "0", "--cycle-length", "3"), "DMTD split"),
        (("--decoding-layers", "2", "--cycle-length", "0"), "--cycle-length: got 0, expected 1 to 256"),
        (("--decoding-layers", "2", "--cycle-length", "257"), "--cycle-length: got 257, expected 1 to 256"),
        ((*SPLIT, "--cycle-origin", "prompt", "--prompt-input", "cyclical"), "undefined"),
        ((*SPLIT, "--curriculum", "3:0.9,2:0.1"), "--curriculum: got 2:0.1, expected"),
        ((*SPLIT, "--curriculum", "4:0.5"), "--curriculum: goes above"),
        ((*SPLIT, "--temperature", "0"), "--temperature"),
        ((*SPLIT, "--train", "lora", "--train-embedding"), "--train-embedding"),
        (("--decoding-layers", "2", "--cycle-length", "1"), "--cycle-length: got 1, expected 2 or more"),
        ((*SPLIT, "--adapter-bits", "5"), "--adapter-bits: has no effect on a checkpoint"),
        ((*SPLIT, "--adapter-bits", "5", "--save", "both", "--train", "lora"), "--adapter-bits: has no effect"),
        ((*SPLIT, "--no-cache", "--cache-dir", "x"), "--cache-dir: has no effect with --no-cache"),
        ((*SPLIT, "--seed", str(2**32)), "--seed: got 4294967296, expected 0 to 4294967295"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    base: str, chats: str, tmp_path: Path, quick: tuple[str, ...], words: str
) -> None:
    assert words in error_line(finetune(base, tmp_path / "out", chats, quick=(*quick, "--device", "cpu")))
    assert not (tmp_path / "out").exists()


def test_the_split_is_that_of_the_adapter_to_start_from(
    finished: tuple[Path, dict[str, Any]], base: str, chats: str, tmp_path: Path
) -> None:
    first, told = finished
    more = ("--initial", str(first), "--max-tokens", "200", "--json")
    same = finetune(base, tmp_path / "same", chats, *more, quick=QUICK[len(SPLIT) :])
    assert same.exit_code == 0, same.output
    assert json.loads(same.stdout)["split"] == told["split"]
    other = finetune(base, tmp_path / "other", chats, *more, "--cycle-length", "2", quick=QUICK[len(SPLIT) :])
    assert json.loads(other.stdout)["split"] == told["split"] | {"cycle_length": 2}


def test_an_adapter_that_is_not_there_is_told_before_anything_is_written(base: str, chats: str, tmp_path: Path) -> None:
    result = finetune(base, tmp_path / "out", chats, "--initial", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert error_line(result).startswith(f"error: --initial: {tmp_path / 'nowhere'}: no adapter")
    assert not (tmp_path / "out").exists()


def test_wrong_usage(base: str, chats: str, tmp_path: Path) -> None:
    result = finetune(base, tmp_path / "out", chats, "--curriculum", "two:half")
    assert result.exit_code == 2 and "LENGTH:SHARE" in result.stderr
    result = dmtd("finetune", base, *SPLIT)
    assert result.exit_code == 2 and "--output" in result.stderr


def test_documents_are_cut_to_a_step_and_that_is_said(base: str, chats: str, tmp_path: Path) -> None:
    result = finetune(base, tmp_path / "out", chats)
    assert result.exit_code == 0 and "documents have at most 128 tokens: --tokens-per-step" in result.stderr
    quick = (*QUICK, "--tokens-per-step", "1024")
    result = finetune(base, tmp_path / "other", chats, quick=quick)
    assert result.exit_code == 0 and "documents have at most 256 tokens: the model takes no more" in result.stderr


def test_a_base_that_is_dmtd_already(chats: str, tmp_path: Path) -> None:
    fields_of = {"num_encoding_layers": 0, "num_thinking_layers": 2, "num_decoding_layers": 2, "mtp_horizon": 3}
    base = write_tiny_checkpoint(tmp_path / "base", tokenizer=True, dmtd=fields_of)
    assert "DMTD checkpoint already" in error_line(finetune(str(base), tmp_path / "out", chats))


def test_the_base_is_never_written_over(base: str, chats: str, tmp_path: Path) -> None:
    before = (Path(base) / "model.safetensors").read_bytes()
    assert "is the base itself" in error_line(finetune(base, Path(base), chats))
    link = tmp_path / "link"
    link.symlink_to(base)
    assert "is the base itself" in error_line(finetune(base, link, chats))
    other = write_tiny_checkpoint(tmp_path / "other", seed=9)
    assert "did not make" in error_line(finetune(base, other, chats))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "holds an adapter that dmtd finetune did not make" in error_line(finetune(base, adapter, chats))
    (adapter / "training").mkdir()  # its own run's, whose states are gone
    initial = finetune(base, adapter, chats, "--initial", str(adapter))
    assert "is the adapter of --initial, which would be lost" in error_line(initial)
    assert (adapter / "adapter_config.json").read_text() == "{}"
    (tmp_path / "file").write_text("x")
    assert "is a file" in error_line(finetune(base, tmp_path / "file", chats))
    assert (Path(base) / "model.safetensors").read_bytes() == before


def test_an_output_that_cannot_be_written(base: str, chats: str, tmp_path: Path, monkeypatch: Any) -> None:
    from pathlib import Path as AnyPath

    whole = AnyPath.mkdir

    def refusing(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.is_relative_to(tmp_path / "out"):
            raise PermissionError(13, os.strerror(13), str(self))
        whole(self, *args, **kwargs)

    monkeypatch.setattr(AnyPath, "mkdir", refusing)
    assert "Permission denied" in error_line(finetune(base, tmp_path / "out", chats))


def test_help_names_every_option_whole_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = dmtd("finetune", "--help").stdout
    assert "…" not in told
    assert "--gradient-checkpointing" in told and "warmup_stable_decay" in told and "bfloat16" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_a_gpu_that_is_not_there(base: str, chats: str, tmp_path: Path) -> None:
    line = error_line(finetune(base, tmp_path / "out", chats, "--device", "cuda"))
    assert "--device: got cuda" in line and "use cpu" in line
