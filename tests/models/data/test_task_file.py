"""Evaluation items out of files: what an item is, what is refused, what counts as a right answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmtd_models.data.errors import DataError
from dmtd_models.data.items import GenerationItem, MultipleChoiceItem
from dmtd_models.data.task_file import read_items

ASKED = {"role": "user", "content": "Capital of France?"}


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_of_choices(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "One and one", "choices": [" is two", " is one"], "answer": 0}\n\n'
        '{"id": "x", "prompt": "Two", "choices": [" is two", " is one"], "answer": 1}\n'
    )
    assert read_items(path) == [
        MultipleChoiceItem(task="mine", item_id="1", prompt="One and one", choices=(" is two", " is one"), answer=0),
        MultipleChoiceItem(task="mine", item_id="x", prompt="Two", choices=(" is two", " is one"), answer=1),
    ]


def test_a_file_of_questions(tmp_path: Path) -> None:
    second = {"messages": [{"role": "user", "content": "Yes or no?"}], "accepted": ["yes"], "chance": 0.5}
    path = written(tmp_path / "mine.jsonl", {"messages": [ASKED], "accepted": ["Paris"], "max_new_tokens": 9}, second)
    one, other = read_items(path)
    assert isinstance(one, GenerationItem) and isinstance(other, GenerationItem)
    assert (one.messages, one.max_new_tokens, one.chance, one.rewordings) == ((ASKED,), 9, 0.0, ())
    assert (other.chance, other.max_new_tokens) == (0.5, 64)
    assert one.score("It is paris.") == 1
    assert one.score("It is Lyon.") == 0


def test_a_question_in_several_wordings(tmp_path: Path) -> None:
    again = {"role": "user", "content": "Please tell me: capital of France?"}
    record = {"messages": [ASKED], "rewordings": [[again]], "accepted": ["Paris"], "match": "first_statement"}
    [item] = read_items(written(tmp_path / "a.jsonl", record))
    assert isinstance(item, GenerationItem)
    assert item.wordings == ((ASKED,), (again,))
    assert item.score("It is Paris, of course. Lyon is large.") == 1
    assert item.score("It is Lyon, I think. Paris is large.") == 0, "what comes after the first statement is no answer"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Seven.", 1),
        ("there are 7", 1),
        ("7th", 0),
        ("seventeen", 0),
        ("17", 0),
        ("It's SEVEN!", 1),
        ("7.5", 0),
        ("", 0),
    ],
)
def test_an_accepted_answer_must_be_a_word(tmp_path: Path, answer: str, right: float) -> None:
    [item] = read_items(written(tmp_path / "a.jsonl", {"messages": [ASKED], "accepted": ["seven", "7"]}))
    assert isinstance(item, GenerationItem) and item.score(answer) == right


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        '{"prompt": "a"}',
        '{"prompt": 3, "choices": ["b", "c"], "answer": 0}',
        '{"prompt": "a", "choices": ["b"], "answer": 0}',
        '{"prompt": "a", "choices": ["b", "c"], "answer": -1}',
        '{"messages": [], "accepted": ["a"]}',
        '{"messages": [{"role": "user"}], "accepted": ["a"]}',
        '{"messages": [{"role": "user", "content": "a"}], "accepted": []}',
        '{"messages": [{"role": "user", "content": "a"}], "accepted": ["b"], "rewordings": [[]]}',
        '{"messages": [{"role": "user", "content": "a"}], "accepted": ["b"], "match": "everywhere"}',
        "not json",
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n' + line)
    with pytest.raises(DataError, match=r"mine.jsonl:2: (no item|got a list|not JSON)"):
        read_items(path)


def test_a_line_ends_where_json_lines_do(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    prompt = "one\u2028two\x85three"
    item = json.dumps({"prompt": prompt, "choices": [" a", " b"], "answer": 1}, ensure_ascii=False)
    path.write_text("\ufeff" + item + "\r\n" + item + "\n", encoding="utf-8")
    found = read_items(path)
    assert [one.prompt for one in found if isinstance(one, MultipleChoiceItem)] == [prompt, prompt]
