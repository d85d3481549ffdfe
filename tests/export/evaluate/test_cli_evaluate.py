"""`dmtd evaluate` from its arguments to its report: checkpoint and bundle agree, bad input is one line."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmtd_export.bundle.export import export_bundle
from dmtd_export.cli.main import main
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import greedy
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.text.tokenizer import Tokenizer

QUICK = ["--threads", "1", "--window-len", "96", "--context-len", "10", "--max-tokens", "1000", "--prefixes", "6"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments)])
    output = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, output.out, output.err


def report_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *QUICK, *arguments, "--json")
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


def assert_close(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal structures; numbers within rounding."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_close(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other, where)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-4), where
    else:
        assert ours == theirs, where


def test_checkpoint_and_bundle_agree(
    checkpoint: Path, bundle: Path, plain_checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[object] = [
        "--text",
        data / "prose.txt",
        "--text",
        data / "documents.jsonl",
        "--base",
        plain_checkpoint,
    ]
    arguments += ["--task", data / "choices.jsonl", "--task", data / "questions.jsonl"]
    arguments += ["--max-tokens", 6000]  # enough for every document
    by_torch = report_of(capsys, checkpoint, *arguments)
    by_graphs = report_of(capsys, bundle, *arguments)
    for report, kind in ((by_torch, "checkpoint"), (by_graphs, "bundle")):
        assert report.pop("model")["kind"] == kind
        report.pop("notes")
        report["split"].pop("convention_recorded")
    assert_close(by_torch, by_graphs)
    assert by_torch["base"] == {
        "path": str(plain_checkpoint),
        "kind": "checkpoint",
        "mode": "plain",
        "is_model": False,
    }
    assert set(by_torch) >= {"perplexity", "agreement_by_phase", "run_lengths", "retention", "tasks", "ci95"}
    assert set(by_torch["agreement_by_phase"]) == {"overall", "0", "1", "2"}
    assert by_torch["counts"]["documents"] == 12
    assert by_torch["bootstrap"]["unit"] == "document"
    for kind, prefixes in (("text", 6), ("chat", 4)):
        runs = by_torch["run_lengths"][kind]
        assert runs["prefixes"] == sum(runs["counts"]) == prefixes


def test_perplexity_is_that_of_the_oracle(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One window of one text, recomputed in float64."""
    from dmtd_models.reference.oracle import teacher_forced

    (data / "short.txt").write_text("Some words to be read, and to be told again.")
    report = report_of(capsys, checkpoint, "--text", data / "short.txt", "--prefixes", "0")
    tokenizer = Tokenizer.from_directory(checkpoint)
    assert tokenizer is not None
    ids = tokenizer.encode((data / "short.txt").read_text())
    with open_checkpoint(checkpoint) as opened:
        assert opened.dmtd is not None
        model = DmtdModel.from_reader(opened.config, opened.dmtd, opened.read, torch.float64)
    likeliest = {}
    for plain, key in ((False, "model"), (True, "plain")):
        logprobs = teacher_forced(model, ids, 10, plain).log_softmax(-1)[10:-1]
        nll = -logprobs.gather(1, torch.tensor(ids[11:])[:, None])[:, 0].numpy()
        likeliest[key] = logprobs.argmax(-1).numpy()
        assert report["perplexity"][key] == pytest.approx(float(np.exp(nll.mean())), rel=1e-4)
        for phase in range(3):
            wanted = float(np.exp(nll[phase::3].mean()))
            assert report["perplexity"]["by_phase"][str(phase)][key] == pytest.approx(wanted, rel=1e-4)
    same = likeliest["model"] == likeliest["plain"]
    assert report["agreement_by_phase"]["overall"] == pytest.approx(float(same.mean()))
    assert report["ci95"]["perplexity"]["overall"] is None  # one window has no spread
    assert report["run_lengths"] == {}


def test_generated_answers_are_the_runtime_s(
    checkpoint: Path, bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of the answers that the oracle writes, each checked as the file says."""
    report = report_of(capsys, bundle, "--task", data / "questions.jsonl")["tasks"]["questions"]
    tokenizer = Tokenizer.from_directory(checkpoint)
    assert tokenizer is not None
    with open_checkpoint(checkpoint) as opened:
        assert opened.dmtd is not None
        model = DmtdModel.from_reader(opened.config, opened.dmtd, opened.read, torch.float64)
    scores: dict[bool, list[bool]] = {False: [], True: []}
    for line in (data / "questions.jsonl").read_text().splitlines():
        item = json.loads(line)
        prompt = f"<|im_start|>user\n{item['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        for plain, found in scores.items():
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            answer = tokenizer.decode(greedy(model, ids, item["max_new_tokens"], plain, stop_ids=(258,)).token_ids)
            words = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in answer.lower()).split()
            found.append(any(accepted in words for accepted in item["accepted"]))
    assert report["score"] == np.mean(scores[False])
    assert report["plain_score"] == np.mean(scores[True])
    assert (report["kind"], report["items"], report["chance"]) == ("generation", 4, 0)


def test_a_plain_base_is_not_warned_about(
    bundle: Path, plain_checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *QUICK, bundle, "--base", plain_checkpoint, "--task", data / "questions.jsonl")
    assert code == 0 and "warning" not in err, err


def test_conventions_are_compared_and_the_best_is_named(
    checkpoint: Path, bundle: Path, plain_checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", data / "prose.txt", "--prefixes", "0", "--base", plain_checkpoint]
    found = report_of(capsys, checkpoint, *arguments, "--compare-conventions")["conventions"]
    single = {
        pair: report_of(
            capsys,
            checkpoint,
            *arguments,
            "--cycle-origin",
            pair.split(" + ")[0],
            "--prompt-input",
            pair.split(" + ")[1],
        )
        for pair in ("absolute + cyclical", "prompt + thinking", "prompt + sum")
    }
    perplexity = {pair: report["perplexity"]["model"] for pair, report in single.items()}
    assert found["perplexity"] == pytest.approx(perplexity)
    assert found["agreement"] == pytest.approx(
        {p: report["agreement_by_phase"]["overall"] for p, report in single.items()}
    )
    assert found["best"] == min(perplexity, key=perplexity.__getitem__)
    assert found["best"] not in found["as_good"] and set(found["as_good"]) <= set(perplexity)
    code, _, err = run(capsys, bundle, *arguments, "--compare-conventions", *QUICK)
    assert code == 2
    assert "is a bundle, which has one convention" in err


def test_a_split_that_the_weights_were_not_trained_for_is_said(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"num_encoding_layers": 1, "num_thinking_layers": 2, "num_decoding_layers": 2, "mtp_horizon": 3}
    model = write_tiny_checkpoint(tmp_path / "m", family="llama", layers=5, tokenizer=True, dmtd=fields)
    arguments = (model, "--text", data / "prose.txt", "--prefixes", "0", "--cycle-length", "2")
    notes = report_of(capsys, *arguments)["notes"]
    assert any("was trained for E1 T2 D2 in cycles of 3" in line for line in notes)
    assert not any("was trained for" in line for line in report_of(capsys, *arguments[:-2])["notes"])


def test_windows_longer_than_the_model_takes_are_shortened_and_that_is_said(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (checkpoint, "--prefixes", "0", "--window-len", "2000")
    notes = report_of(capsys, *arguments, "--text", data / "prose.txt")["notes"]
    assert "windows of text have 256 tokens: the model takes no more" in notes
    notes = report_of(capsys, *arguments, "--task", data / "choices.jsonl")["notes"]
    assert not any("windows" in line for line in notes), "no text, no windows"


@pytest.mark.parametrize("option", ["--lm-eval-chat", "--lm-eval-include=x", "--run-unsafe-code"])
def test_options_without_effect_are_refused(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    code, _, err = run(capsys, checkpoint, "--text", data / "prose.txt", option)
    assert code == 2 and f"{option.partition('=')[0]}: has no effect without" in err


def test_offsets_of_checkpoint_and_bundle_agree(
    checkpoint: Path, bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", data / "prose.txt", "--prefixes", "0", "--offsets"]
    of_checkpoint, of_bundle = (report_of(capsys, path, *arguments)["offsets"] for path in (checkpoint, bundle))
    assert of_checkpoint["by_offset"].keys() == of_checkpoint["by_phase"].keys() == of_bundle["by_phase"].keys()
    for kind in ("by_offset", "by_phase"):
        for name, found in of_checkpoint[kind].items():
            assert found["ratio"] == pytest.approx(of_bundle[kind][name]["ratio"], rel=1e-4)
    assert len({round(found["plain"], 6) for found in of_checkpoint["by_phase"].values()}) == 1
    code, out, err = run(capsys, checkpoint, *arguments, *QUICK)
    assert code == 0, err
    assert "the same tokens at 0, head" in out and max(map(len, out.splitlines())) <= 80


def test_a_quantised_bundle_is_held_to_its_float_twin(
    checkpoint: Path, bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ratios are those of what each says alone."""
    export_bundle(checkpoint, tmp_path / "int4", ExportOptions(formats=WeightOptions(weights="int4"), verify=False))
    arguments = ("--text", data / "documents.jsonl", "--prefixes", 0)
    found = report_of(capsys, tmp_path / "int4", "--base", bundle, *arguments)["weight_formats"]
    alone = [report_of(capsys, path, *arguments) for path in (tmp_path / "int4", bundle)]
    assert all(report["weight_formats"] is None for report in alone)
    ours, theirs = (report["perplexity"] for report in alone)
    assert found["plain"]["ratio"] == pytest.approx(ours["plain"] / theirs["plain"], rel=1e-5)
    assert found["plain"]["ratio"] != pytest.approx(1, abs=1e-5)
    assert found["cycles"]["overall"]["ratio"] == pytest.approx(ours["model"] / theirs["model"], rel=1e-5)
    for phase, own in ours["by_phase"].items():
        expected = own["model"] / theirs["by_phase"][phase]["model"]
        assert found["cycles"][phase]["ratio"] == pytest.approx(expected, rel=1e-5)
    code, out, _ = run(capsys, tmp_path / "int4", "--base", bundle, *arguments, *QUICK)
    assert code == 0
    assert "both plain" in out and "in cycles at 0, head" in out


def test_table_and_plots(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", data / "prose.txt", "--task", data / "choices.jsonl", "-o", tmp_path / "out"]
    code, out, err = run(capsys, checkpoint, *arguments, "--compare-conventions", *QUICK)
    assert code == 0, err
    for name in ("agreement.png", "perplexity.png", "retention.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["schema"] == 1
    for phrase in ("held-out text", "0, head", "run length", "retention", "the baseline is the model itself", "best"):
        assert phrase in " ".join(out.split()), phrase
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "nothing to evaluate on"),
        (["--text", "no-such-text"], "--text: no-such-text: no such file or directory"),
        (
            ["--task", "hellaswag"],
            "--task: hellaswag: no such file; a task is a file of items of your own (.jsonl), names",
        ),
        (["--task", "hellaswag"], "are those of the lm-eval harness: --lm-eval hellaswag"),
        (["--text", "{data}/empty.txt"], "no document has"),
        (["--task", "{data}/empty.jsonl"], "no items"),
        (["--task", "{data}/empty.txt"], "got a .txt file, expected a .jsonl"),
        (["--task", "{data}/mixed.jsonl"], "mixes multiple choice and generation"),
        (["--task", "{data}/broken.jsonl"], "broken.jsonl:1: no item"),
        (["--text", "{data}/prose.txt", "--text", "{data}/prose.txt"], "given twice"),
        (["--text", "{data}/prose.txt", "--window-len", "20"], "--window-len: got 20"),
        (["--text", "{data}/prose.txt", "--max-tokens", "0"], "--max-tokens: got 0"),
        (
            ["--text", "{data}/prose.txt", "--base", "{data}/nowhere"],
            "--base: {data}/nowhere: no such file or directory; give a bundle",
        ),
        (["--text", "{data}/prose.txt", "--base", "{data}/prose.txt"], "--base: {data}/prose.txt: got a file that is"),
        (["--text", "{data}/prose.txt", "--adapter", "{data}/nowhere"], "--adapter: {data}/nowhere: no adapter"),
        (["--text", "{data}/prose.txt", "--cycle-origin", "prompt", "--prompt-input", "cyclical"], "undefined"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, data: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty.txt", "empty.jsonl"):
        (data / name).write_text("")
    (data / "mixed.jsonl").write_text(
        (data / "choices.jsonl").read_text() + "\n" + (data / "questions.jsonl").read_text()
    )
    (data / "broken.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 2}')
    code, out, err = run(capsys, checkpoint, *(part.format(data=data) for part in extra))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (out, len(errors)) == ("", 1) and code == (2 if errors[0].startswith("error: --") else 1)
    assert message.format(data=data) in errors[0]


def test_a_plain_checkpoint_needs_a_split(
    plain_checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, plain_checkpoint, "--text", data / "prose.txt", *QUICK)
    assert code == 2
    assert "give --decoding-layers and --cycle-length" in err
    report = report_of(
        capsys, plain_checkpoint, "--text", data / "prose.txt", "--decoding-layers", "1", "--cycle-length", "2"
    )
    assert report["split"]["dmtd_trained"] is False
    assert any("no DMTD training" in line for line in report["notes"])


def test_a_bundle_takes_no_split(bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, bundle, "--text", data / "prose.txt", "--cycle-length", "2")
    assert code == 2
    assert f"error: --cycle-length: {bundle} is a bundle, whose split is fixed" in err


def test_a_checkpoint_without_tokenizer(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"num_thinking_layers": 1, "num_decoding_layers": 1, "mtp_horizon": 2}
    made = write_tiny_checkpoint(tmp_path / "made", layers=2, dmtd=fields)
    code, _, err = run(capsys, made, "--text", data / "prose.txt")
    assert code == 1
    assert "has no tokenizer.json" in err


def test_a_seed_below_zero(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, checkpoint, "--text", data / "prose.txt", "--seed", "-1")
    assert code == 2
    assert "--seed: got -1, expected 0 or more" in err


def test_an_output_that_cannot_be_is_told_before_anything_is_measured(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmtd_export.evaluate.evaluate", lambda *arguments: pytest.fail("measured"))
    code, out, err = run(capsys, checkpoint, "--text", data / "prose.txt", "-o", data / "prose.txt")
    assert (code, out) == (2, "")
    assert f"error: --output: {data / 'prose.txt'} is a file, expected a directory; give another one" in err


def test_a_disk_that_fills_takes_the_files_alone(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "report.json")

    monkeypatch.setattr(Path, "write_text", full)
    code, out, err = run(capsys, checkpoint, "--text", data / "prose.txt", *QUICK, "-o", tmp_path / "out", "--json")
    assert code == 1
    assert json.loads(out)["perplexity"]["model"] > 1, "what was measured is shown all the same"
    assert "error: no space left on the device (report.json)" in err
