"""Tasks out of files: what an item is, what is refused, what counts as a right answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.tasks import contains_word, read_task
from dmtd_models.data.items import GenerationItem, MultipleChoiceItem


def test_a_file_of_choices(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "One and one", "choices": [" is two", " is one"], "answer": 0}\n\n'
        '{"id": "x", "prompt": "Two", "choices": [" is two", " is one"], "answer": 1}\n'
        '{"prompt": "", "choices": ["a", "b"], "answer": 1}\n'
    )
    items = read_task(str(path), tmp_path, 2, 0)
    assert items == [
        MultipleChoiceItem(task="mine", item_id="1", prompt="One and one", choices=(" is two", " is one"), answer=0),
        MultipleChoiceItem(task="mine", item_id="x", prompt="Two", choices=(" is two", " is one"), answer=1),
    ]


def test_a_file_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "Capital of France?"}], "accepted": ["Paris"], "max_new_tokens": 9}\n'
        '{"messages": [{"role": "user", "content": "Yes or no?"}], "accepted": ["yes"], "chance": 0.5}\n'
    )
    first, second = read_task(str(path), tmp_path, None, 0)
    assert isinstance(first, GenerationItem)
    assert isinstance(second, GenerationItem)
    assert (first.messages, first.max_new_tokens, first.chance) == (
        ({"role": "user", "content": "Capital of France?"},),
        9,
        0.0,
    )
    assert second.chance == 0.5
    assert first.score("It is paris.") == 1
    assert first.score("It is Lyon.") == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Seven.", 1), ("there are 7", 1), ("7th", 0), ("seventeen", 0), ("17", 0), ("It's SEVEN!", 1), ("", 0)],
)
def test_an_accepted_answer_must_be_a_word(answer: str, right: float) -> None:
    assert contains_word(answer, accepted=("seven", "7")) == right


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
        "not json",
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n' + line)
    with pytest.raises(EvaluateError, match=r"mine.jsonl:2: (no item|got list|not JSON)"):
        read_task(str(path), tmp_path, None, 0)


def test_code_is_run_only_when_allowed(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="run code that the model writes"):
        read_task("humaneval", tmp_path, 2, 0)


def test_a_line_ends_where_json_lines_do(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    prompt = "one\u2028two\x85three"
    item = json.dumps({"prompt": prompt, "choices": [" a", " b"], "answer": 1}, ensure_ascii=False)
    path.write_text("\ufeff" + item + "\r\n" + item + "\n", encoding="utf-8")
    assert [one.prompt for one in read_task(str(path), tmp_path, None, 0)] == [prompt, prompt]
