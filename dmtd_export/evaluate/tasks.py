"""Where items come from: a registered task by name, or a file of one's own.

A file is JSON lines, of one kind: ``{"prompt", "choices", "answer"}`` (multiple choice; choices with their leading space) or
``{"messages", "accepted", "max_new_tokens"}`` (an answer is right if it contains an accepted one as a word, case ignored).
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_models.text.items import GenerationItem, MultipleChoiceItem

Items = Sequence[MultipleChoiceItem] | Sequence[GenerationItem]
TASKS_MODULE = "dmtd_models.text.tasks"  # loaded by name: it reaches for packages only when a task is asked for
DEFAULT_NEW_TOKENS = 64


def task_names() -> tuple[str, ...]:
    """Registered tasks."""
    try:
        return tuple(importlib.import_module(TASKS_MODULE).task_names())
    except ModuleNotFoundError:
        return ()


def read_task(name: str, cache_dir: Path, limit: int | None, seed: int) -> Items:
    """At most ``limit`` items of a registered task or of a file.

    Raises:
        EvaluateError: neither of the two, or a file with a line that is no item.
    """
    path = Path(name)
    if path.is_file():
        items: Items = _read_file(path)[:limit]
    elif name in task_names():
        items = importlib.import_module(TASKS_MODULE).load_task(name, cache_dir=cache_dir, limit=limit, seed=seed)
    else:
        known = ", ".join(task_names()) or "none"
        raise EvaluateError(f"--task: got {name}, expected a .jsonl file or a registered task ({known})")
    if not items:
        raise EvaluateError(f"--task {name}: no items; give a task that has some, or a larger --limit")
    return items


def contains_word(answer: str, *, accepted: Sequence[str]) -> float:
    """1 if one of the accepted answers stands in the text as whole words, case ignored."""
    return float(any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", answer, re.IGNORECASE) for a in accepted))


def _read_file(path: Path) -> list[Any]:
    items: list[Any] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line), path.stem, str(number)))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluateError(
                f"{path}:{number}: no item ({type(error).__name__}: {error}); expected prompt, choices and answer, or "
                "messages and accepted"
            ) from None
    if len({type(item) for item in items}) > 1:
        raise EvaluateError(f"{path}: mixes multiple choice and generation; put them into two files")
    return items


def _item(raw: Mapping[str, Any], task: str, number: str) -> MultipleChoiceItem | GenerationItem:
    if "choices" in raw:
        choices, answer = tuple(str(c) for c in raw["choices"]), int(raw["answer"])
        if len(choices) < 2 or not 0 <= answer < len(choices) or not isinstance(raw["prompt"], str):
            raise ValueError(f"answer {answer} of {len(choices)} choices")
        return MultipleChoiceItem(
            task=task, item_id=str(raw.get("id", number)), prompt=raw["prompt"], choices=choices, answer=answer
        )
    messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in raw["messages"])
    accepted = tuple(str(a) for a in raw["accepted"])
    if not messages or not accepted:
        raise ValueError("messages or accepted is empty")
    return GenerationItem(
        task=task,
        item_id=str(raw.get("id", number)),
        messages=messages,
        max_new_tokens=int(raw.get("max_new_tokens", DEFAULT_NEW_TOKENS)),
        score=functools.partial(contains_word, accepted=accepted),
        chance=float(raw.get("chance", 0.0)),
    )
