"""The text of ``dmtd finetune``: what cannot be used, what is left out, what the base writes itself."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from finetune_cli import error_line, finetune, write_lines

USER, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello there."}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no data"),
        ([{"messages": [USER]}], "got no assistant message, expected a chat with both sides"),
        ([{"messages": [USER, ANSWER]}, {"messages": [ANSWER]}], "d.jsonl:2: messages: got no user message"),
        ([{"messages": [USER, {**ANSWER, "content": None, "tool_calls": [{}]}]}], "tool calls are not learnt"),
        ([{"words": "Hi."}], "expected one of `messages`, `text`"),
        ([{"prompt_ids": [1, 2], "answer_ids": [9999]}], "9999"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(base: str, tmp_path: Path, rows: list[Any], words: str) -> None:
    assert words in error_line(finetune(base, tmp_path / "out", write_lines(tmp_path / "d.jsonl", *rows)))


def test_no_data_at_all(base: str, tmp_path: Path) -> None:
    assert "--data" in error_line(finetune(base, tmp_path / "out", None))
    assert "no such file" in error_line(finetune(base, tmp_path / "out", str(tmp_path / "none.jsonl")))


def test_what_is_evaluated_on_is_not_learnt(base: str, tmp_path: Path, at_forward: Any) -> None:
    question = "A farmer has twelve sheep and sells five of them; how many are left?"
    asked = [{"role": "user", "content": question}, ANSWER]
    chats = [{"messages": [{"role": "user", "content": f"Say {number}."}, ANSWER]} for number in range(30)]
    data = write_lines(tmp_path / "d.jsonl", {"messages": asked}, *chats)
    items = write_lines(tmp_path / "items.jsonl", {"messages": asked[:1], "accepted": ["seven"]})
    command = ("--max-tokens", "600", "--eval-every", "0", "--json")
    at_forward(2, lambda: signal.raise_signal(signal.SIGINT))
    assert finetune(base, tmp_path / "out", data, *command, "--decontaminate", items).exit_code == 130
    record = json.loads((tmp_path / "out" / "training" / "job.json").read_text())
    assert record["documents"] == [30, 0] and record["decontaminate"] == [items]
    assert "--decontaminate" in error_line(finetune(base, tmp_path / "out", data, *command))
    result = finetune(base, tmp_path / "out", data, *command, "--decontaminate", items)
    assert result.exit_code == 0, (result.output, result.exception)
    text = json.loads(result.stdout)["text"]
    assert "documents left out because something of --decontaminate occurs in them: 1 of 31" in text


@pytest.mark.parametrize("option", ["--data", "--held-out", "--decontaminate"])
def test_names_of_corpora_and_tasks_are_no_files(base: str, chats: str, tmp_path: Path, option: str) -> None:
    line = error_line(finetune(base, tmp_path / "out", chats, option, "austen"))
    assert "austen: no such file or directory; give" in line


def test_the_base_writes_chats_over_given_prompts(base: str, tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("".join(f"What is {number}?\n" for number in range(8)))
    written = ("--answer-tokens", "200", "--questions", str(tmp_path / "asked.txt"), "--max-tokens", "200", "--json")
    result = finetune(base, tmp_path / "out", None, *written, "--save", "adapter")
    assert result.exit_code == 0, (result.output, result.exception)
    [text] = json.loads(result.stdout)["text"]
    assert f"{tmp_path / 'out' / 'training' / 'answers'}: " in text and " answer)" in text
    [shard] = (tmp_path / "out" / "training" / "answers").glob("*.jsonl")
    assert {json.loads(line)["kind"] for line in shard.read_text().splitlines()} == {"given"}
    line = error_line(finetune(base, tmp_path / "other", None, "--questions", str(tmp_path / "asked.txt")))
    assert "--questions: has no effect without --answer-tokens" in line
