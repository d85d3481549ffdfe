"""What --decontaminate looks for: items, chats and texts out of a user's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmtd_models.data.errors import DataError
from dmtd_models.data.overlap import Probe
from dmtd_models.finetune.probes import read_probes

ASKED = {"role": "user", "content": "What is ice?"}
ANSWER = {"role": "assistant", "content": "Frozen water."}


def lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_every_kind_of_file(tmp_path: Path) -> None:
    again = [{"role": "user", "content": "Tell me: what is ice?"}]
    (tmp_path / "plain.txt").write_text("It was cold.")
    files = [
        lines(tmp_path / "choices.jsonl", {"prompt": "Ice", "choices": [" is cold", " is hot"], "answer": 0}),
        lines(tmp_path / "asked.jsonl", {"messages": [ASKED], "accepted": ["water"], "rewordings": [again]}),
        lines(tmp_path / "chats.jsonl", {"messages": [ASKED, ANSWER]}, {"messages": [ASKED]}),
        lines(tmp_path / "texts.jsonl", {"text": "Ice is cold."}),
        str(tmp_path / "plain.txt"),
    ]
    both = ("What is ice?", "Tell me: what is ice?")
    assert read_probes(files) == (
        Probe(item="choices/1", texts=("Ice is cold", "Ice is hot"), questions=("Ice",)),
        Probe(item="asked/1", texts=both, questions=both),
        Probe(item="chats.jsonl:1", texts=("What is ice?", "Frozen water."), questions=("What is ice?",)),
        Probe(item="chats.jsonl:2", texts=("What is ice?",), questions=("What is ice?",)),
        Probe(item="texts.jsonl:1", texts=("Ice is cold.",)),
        Probe(item="plain.txt", texts=("It was cold.",)),
    )
    assert read_probes([]) == ()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "none.jsonl: no such file or directory"),
        ("hellaswag", None, "hellaswag: no such file or directory; give items, chats or texts that you have"),
        ("a.jsonl", "", "got no records"),
        ("a.jsonl", '{"words": 1}\n', "a.jsonl:1: got neither an item nor `messages` nor `text`"),
        ("a.jsonl", '{"messages": []}\n', "a.jsonl:1: got neither"),
        ("a.jsonl", '{"prompt": "a", "choices": ["b"], "answer": 0}\n', "a.jsonl:1: no item"),
    ],
)
def test_what_cannot_be_looked_for_is_one_line(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        read_probes([str(tmp_path / name) if content is not None else name])
    assert str(caught.value).startswith("decontaminate: ")
