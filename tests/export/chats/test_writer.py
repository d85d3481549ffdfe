"""The base model writing training text through the runtime: documents against the oracle, faults, resumption. Tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmtd_export.chats import writer
from dmtd_export.chats.writer import write_chats
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions, resolve_dmtd
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.errors import ModelError
from dmtd_models.finetune.self_written import ChatRequest, chat_frame
from dmtd_models.finetune.shards import AnswersError
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import greedy
from dmtd_models.reference.testing import write_tiny_checkpoint

END = 258  # of the tiny tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "base", seed=5, tokenizer=True)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model says little of use: short answers, all greedy, loops welcome."""
    monkeypatch.setattr(writer, "MAX_ANSWER_LEN", 12)
    monkeypatch.setattr(writer, "ANSWER_TEMPERATURES", (0.0,))
    monkeypatch.setattr(writer, "is_loop", lambda answer, numbers: False)


def asking(path: Path, count: int, first: int = 0) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"What is {first + n}?"}) + "\n" for n in range(count)))
    return path


@pytest.fixture
def request_of(base: Path, tmp_path: Path) -> Callable[..., ChatRequest]:
    def make(model: Path = base, **changes: Any) -> ChatRequest:
        with open_checkpoint(model) as checkpoint:
            tokenizer = TextTokenizer.of_checkpoint(checkpoint)
        usual = ChatRequest(
            base=model,
            tokenizer=tokenizer,
            directory=tmp_path / "answers",
            answer_tokens=60,
            longest=128,
            questions=None,
            seed=3,
            device="cpu",
            precision="float32",
            threads=1,
        )
        return replace(usual, **changes)

    return make


def documents(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(directory.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_greedy_answers_are_the_oracle_s(base: Path, request_of: Any, tmp_path: Path) -> None:
    told: list[int] = []
    request = request_of(questions=asking(tmp_path / "q.jsonl", 9))
    write_chats(request, told.append)
    made = documents(request.directory)
    assert told[0] == 0 and told[-1] == sum(len(document["answer_ids"]) for document in made) >= 60
    with open_checkpoint(base) as checkpoint:
        plain = resolve_dmtd(checkpoint.config, None, SplitOptions(decoding_layers=1, cycle_length=1))
        model = DmtdModel.from_reader(checkpoint.config, plain, checkpoint.read, torch.float64)
    for document in made:
        prompt = f"<|im_start|>user\nWhat is {document['index']}?<|im_end|>\n<|im_start|>assistant\n"
        assert document["prompt_ids"] == request.tokenizer.encode_rendered(prompt)
        expected = greedy(model, document["prompt_ids"], 12, plain=True, stop_ids=[END]).token_ids
        assert tuple(document["answer_ids"]) == expected
        assert document["finish"] == ("stop" if expected[-1] == END else "length")
        assert document["kind"] == "given"
    assert not [path for path in request.directory.iterdir() if path.is_dir()], "the bundle is gone"


def test_a_run_ends_with_its_prompts(request_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = request_of(questions=asking(tmp_path / "q.jsonl", 6), answer_tokens=5000)
    write_chats(request, lambda tokens: None)
    assert [document["index"] for document in documents(request.directory)] == list(range(6))
    assert "all 6 prompts are used" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_opened", None)  # nothing is left to do, so nothing is exported
        write_chats(request, lambda tokens: None)


def test_the_same_questions_with_another_batch_or_after_a_stop(request_of: Any, tmp_path: Path) -> None:
    asked = asking(tmp_path / "q.jsonl", 12)
    whole = request_of(questions=asked, answer_tokens=5000, directory=tmp_path / "whole")
    write_chats(whole, lambda tokens: None)
    cut = replace(whole, directory=tmp_path / "cut", answer_tokens=140)

    def stop(tokens: int) -> None:
        if tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_chats(cut, stop)
    assert 0 < len(documents(cut.directory)) < 12
    # A kill between a shard and its entry in the state leaves a shard that must be written anew.
    (cut.directory / "answers-3-00001.jsonl").write_text("{}\n")
    write_chats(replace(cut, answer_tokens=5000), lambda tokens: None)
    assert documents(cut.directory) == documents(whole.directory)


def test_other_options_on_resuming_are_refused(request_of: Any, tmp_path: Path) -> None:
    asked = asking(tmp_path / "q.jsonl", 8)
    request = request_of(questions=asked, answer_tokens=10)
    write_chats(request, lambda tokens: None)
    with pytest.raises(AnswersError, match="other options"):
        write_chats(replace(request, longest=100), lambda tokens: None)
    asking(asked, 8, first=100)
    with pytest.raises(AnswersError, match="other options"):
        write_chats(request, lambda tokens: None)


def test_repeated_and_long_prompts_are_dropped(request_of: Any, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("What is one?\n\nWhat is one?\nWhat is " + "two " * 40 + "?\n")
    request = request_of(questions=tmp_path / "q.txt", answer_tokens=5000)
    write_chats(request, lambda tokens: None)
    assert [document["index"] for document in documents(request.directory)] == [0]
    state = json.loads((request.directory / ".answers-3.json").read_text())["state"]
    assert state["dropped"] == {"repeated": 1, "long prompt": 1}


def likelier_end(base: Path, directory: Path) -> Path:
    """The base whose end token is likelier: a random model hardly ends a turn."""
    from safetensors.numpy import load_file, save_file

    directory.mkdir()
    for file in base.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][END] *= 4
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_questions_that_the_model_asks_itself(base: Path, request_of: Any, tmp_path: Path) -> None:
    request = request_of(model=likelier_end(base, tmp_path / "model"))
    write_chats(request, lambda tokens: None)
    made = documents(request.directory)
    tokenizer = request.tokenizer
    frame = chat_frame(
        tokenizer.encode_rendered, lambda text: f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    questions = set()
    for document in made:
        prompt, answer = tuple(document["prompt_ids"]), document["answer_ids"]
        assert prompt[: len(frame.before)] == frame.before and prompt[-len(frame.after) :] == frame.after
        question = prompt[len(frame.before) : -len(frame.after)]
        assert len(question) >= 4 and not tokenizer.special_ids & set(question)
        assert not tokenizer.special_ids & set(answer[:-1]) and len(answer) <= 12
        assert document["kind"] == "self"
        questions.add(question)
    assert made and len(questions) == len(made)
    again = replace(request, directory=tmp_path / "again")
    write_chats(again, lambda tokens: None)
    assert documents(again.directory) == made, "every draw hangs on seed and number"
    other = replace(request, directory=tmp_path / "other", seed=4)
    write_chats(other, lambda tokens: None)
    assert documents(other.directory) != made


def test_a_base_that_writes_nothing_of_use(request_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_WASTED", 8)
    monkeypatch.setattr(writer, "is_loop", lambda answer, numbers: True)
    monkeypatch.setattr(writer, "MAX_QUESTION_LEN", 5)
    with pytest.raises(AnswersError, match=r"got none of use from .*question.*give --questions FILE"):
        write_chats(request_of(), lambda tokens: None)


def test_a_model_without_an_end_token_is_refused(request_of: Any, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", tokenizer=True)
    config = json.loads((path / "config.json").read_text())
    del config["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnswersError, match="no end-of-sequence token"):
        write_chats(request_of(model=path), lambda tokens: None)


def test_no_room_for_a_question(request_of: Any) -> None:
    with pytest.raises(AnswersError, match="leaves no room for a question; raise --max-length"):
        write_chats(request_of(longest=34), lambda tokens: None)


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_out_of_chats(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
    file = lines(
        tmp_path / "a.jsonl", {"messages": [user, answer]}, {"messages": [user, answer, user]}, {"prompt": "Why?"}
    )
    assert writer.read_questions(file) == [(user,), (user, answer, user), ({"role": "user", "content": "Why?"},)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such file or directory"),
        ("a.jsonl", "", "got no prompts"),
        ("a.txt", "\n \n", "got no prompts"),
        ("a.jsonl", '{"text": "x"}\n', "a.jsonl:1: got neither a `prompt` nor `messages`"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "a.jsonl:1: got neither"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 5}]}\n', "a.jsonl:1: got neither"),
        ("a.jsonl", '{"messages": 5}\n', "a.jsonl:1: got neither"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=says) as caught:
        writer.read_questions(tmp_path / name)
    assert str(caught.value).startswith("questions: ")
