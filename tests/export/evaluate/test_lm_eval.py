"""The adapter for lm-eval on tasks whose data is local: log-likelihoods and generated text against the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason='pip install "dmtd[lm-eval]"')

# The harness and what it imports warn about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]

from dmtd_models.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from dmtd_models.reference.dmtd import DmtdModel  # noqa: E402
from dmtd_models.reference.oracle import greedy, teacher_forced  # noqa: E402

CHOICES = [
    {
        "question": f"{i} and {i} are",
        "choices": [f" {i + i} in all", " many things", " nothing at all"],
        "answer": i % 3,
    }
    for i in range(5)
]
TEXTS = ["A first text.", "Another one, which is longer than the first: " + "word " * 60]


def write_tasks(directory: Path) -> Path:
    """Three tasks: one each of multiple choice, generation, and whole texts."""
    (directory / "choices.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    (directory / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))

    def task(name: str, data: str, **fields: Any) -> None:
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(directory / data)}},
            "test_split": "test",
            **fields,
        }
        (directory / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML

    task(
        "local_choice",
        "choices.jsonl",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    task(
        "local_answer",
        "choices.jsonl",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="never",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    task(
        "local_text",
        "texts.jsonl",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> DmtdModel:
    with open_checkpoint(checkpoint) as opened:
        assert opened.dmtd is not None
        return DmtdModel.from_reader(opened.config, opened.dmtd, opened.read, torch.float64)


def encode(text: str) -> list[int]:
    """The tiny tokenizer's ids, by its definition: a byte's place in the sorted byte alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [alphabet.index(letter) for piece, _ in pieces for letter in piece]


def logprob(oracle: DmtdModel, ids: list[int], prompt_len: int, plain: bool) -> float:
    rows = teacher_forced(oracle, ids, prompt_len, plain).log_softmax(-1)[prompt_len - 1 : -1]
    return float(rows.gather(1, torch.tensor(ids[prompt_len:])[:, None]).sum())


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
@pytest.mark.parametrize("plain", [False, True])
def test_the_harness_gets_the_oracle_s_numbers(
    kind: str, plain: bool, checkpoint: Path, bundle: Path, tasks: Path, oracle: DmtdModel
) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    path = {"checkpoint": checkpoint, "bundle": bundle}[kind]
    import dmtd_export.evaluate.lm_eval_adapter  # noqa: F401 - registers the model by name

    found = simple_evaluate(
        model="dmtd",
        model_args={"pretrained": str(path), "plain": plain, "threads": 1},
        tasks=["local_choice", "local_answer", "local_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    for sample, item in zip(found["samples"]["local_choice"], CHOICES, strict=True):
        context = encode(item["question"])
        wanted = [logprob(oracle, context + encode(c), len(context), plain) for c in item["choices"]]
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(wanted, abs=1e-3)
        assert sample["acc"] == float(max(range(3), key=wanted.__getitem__) == item["answer"])
    for sample, item in zip(found["samples"]["local_answer"], CHOICES, strict=True):
        run = greedy(oracle, encode(item["question"]), 5, plain, stop_ids=(258,))
        assert sample["resps"][0][0].encode("utf-8", "replace") == text_of(run.token_ids).encode("utf-8", "replace")
    for sample, text in zip(found["samples"]["local_text"], TEXTS, strict=True):
        wanted_text = whole_text(oracle, encode(text), plain)
        assert sample["resps"][0][0] == pytest.approx(wanted_text, rel=1e-5)
        assert sample["word_perplexity"][0] == pytest.approx(wanted_text, rel=1e-5)


def whole_text(oracle: DmtdModel, ids: list[int], plain: bool) -> float:
    """Behind the BOS; what does not fit into the model's 256 positions is scored behind the 256 before its end."""
    total, rest = logprob(oracle, [256, *ids[:255]], 1, plain), len(ids) - 255
    return total if rest <= 0 else total + logprob(oracle, ids[-256:], 256 - rest, plain)


def text_of(ids: tuple[int, ...]) -> str:
    """Text of token ids, special tokens left out, cut at a blank line."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = {letter: byte for byte, letter in _byte_letters().items()}
    raw = bytes(byte_of[alphabet[i]] for i in ids if i < 256)
    return raw.decode("utf-8", "replace").split("\n\n")[0]


def _byte_letters() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def test_evaluate_takes_tasks_of_the_harness(
    checkpoint: Path, plain_checkpoint: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dmtd_export.cli.main import main

    arguments = ["evaluate", str(checkpoint), "--base", str(plain_checkpoint), "--threads", "1", "--json"]
    arguments += ["--lm-eval", "local_choice,local_answer,local_text", "--lm-eval-include", str(tasks), "--limit", "4"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    output = capsys.readouterr()
    assert ended.value.code == 0, output.err
    report = json.loads(output.out)
    choice, answer = report["tasks"]["local_choice"], report["tasks"]["local_answer"]
    assert (choice["kind"], choice["metric"], choice["items"]) == ("lm_eval", "acc_norm", 4)
    assert choice["chance"] == pytest.approx(1 / 3)
    assert (answer["metric"], answer["score"], answer["chance"]) == ("exact_match", 0, 0)
    assert any("local_text" in line for line in report["notes"])


def test_an_unknown_task_is_one_line(
    checkpoint: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    from dmtd_export.cli.main import main
    from dmtd_export.evaluate import lm_eval_run

    # Reading all the harness's own tasks takes many seconds.
    own = TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr(lm_eval_run, "_task_manager", lambda options: own)

    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(checkpoint), "--lm-eval", "no_such_task", "--lm-eval-include", str(tasks)])
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no_such_task" in errors[0]
