"""Where items come from: a registered task by name, or a file of one's own.

A file (.jsonl, .json, .parquet) has records of one kind: ``{"prompt", "choices", "answer"}`` (multiple choice; choices with
their leading space) or ``{"messages", "accepted", "max_new_tokens"}`` (an answer is right if it contains an accepted one as a
word, case ignored).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_models.data.items import GenerationItem, MultipleChoiceItem
from dmtd_models.data.rows import read_rows
from dmtd_models.data.tasks import load_task
from dmtd_models.errors import ModelError

Items = Sequence[MultipleChoiceItem] | Sequence[GenerationItem]
DEFAULT_NEW_TOKENS = 64


def read_task(name: str, cache_dir: Path, limit: int | None, seed: int, *, run_unsafe_code: bool = False) -> Items:
    """At most ``limit`` items of a registered task or of a file; ``run_unsafe_code`` allows tasks that run what is written.

    Raises:
        EvaluateError: neither of the two, a file with a line that is no item, or a package that cannot be had.
    """
    path = Path(name)
    if path.is_file():
        items: Items = _read_file(path)[:limit]
    else:
        try:
            items = load_task(name, cache_dir, limit, seed, allow_code_execution=run_unsafe_code)
        except ModelError as error:
            raise EvaluateError(f"{name}, which is no file: {error}", param="task") from error
    if not items:
        raise EvaluateError(f"{name}: no items; give a task that has some, or a larger --limit", param="task")
    return items


def contains_word(answer: str, *, accepted: Sequence[str]) -> float:
    """1 if one of the accepted answers stands in the text as whole words, case ignored."""
    return float(any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", answer, re.IGNORECASE) for a in accepted))


def _read_file(path: Path) -> list[Any]:
    items: list[Any] = []
    try:
        for number, row in enumerate(read_rows(path), 1):
            try:
                items.append(_item(row.values, path.stem, str(number)))
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluateError(
                    f"{row.where}: no item ({type(error).__name__}: {error}); expected prompt, choices and answer, or "
                    "messages and accepted"
                ) from None
    except ModelError as error:
        raise EvaluateError(f"{error}", param="task") from error
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
