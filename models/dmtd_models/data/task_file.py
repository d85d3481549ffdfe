"""Evaluation items out of a file of one's own: ``read_items(path)``. No torch.

A file (.jsonl, .json, .parquet) has records of one kind:

    {"prompt": ..., "choices": [...], "answer": 0}    the likeliest choice is the answer; choices with their leading space
    {"messages": [...], "accepted": [...]}            an answer is right if an accepted one stands in it as a word, in any case

and may have ``id``; of the second kind also ``max_new_tokens``, ``chance`` (of a guess), ``rewordings`` (a list of further
``messages`` that ask the same; an item's score is the mean over all wordings) and ``"match": "first_statement"`` (what the model
rambles on about after its first statement is not its answer). The task is called as the file is, without its suffix.

Flow: ``dmtd evaluate --task`` and ``dmtd finetune --decontaminate``. Nothing here asks a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dmtd_models.data.errors import DataError
from dmtd_models.data.items import GenerationItem, MultipleChoiceItem
from dmtd_models.data.rows import read_rows
from dmtd_models.data.scoring import names_one_of, states_one_of

Items = Sequence[MultipleChoiceItem] | Sequence[GenerationItem]
DEFAULT_NEW_TOKENS = 64
_MATCHES = {"anywhere": names_one_of, "first_statement": states_one_of}


def is_item(values: Mapping[str, Any]) -> bool:
    """Whether a record means to be an item, and not a text or a chat to train on."""
    return "choices" in values or "accepted" in values


def read_items(path: Path) -> Items:
    """Every item of a file; none if it is empty.

    Raises:
        DataError: a record that is no item, by file and line; both kinds in one file.
    """
    items: list[Any] = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            items.append(_item(row.values, path.stem, str(number)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{row.where}: no item ({type(error).__name__}: {error}); expected prompt, choices and answer, or "
                "messages and accepted"
            ) from None
    if len({type(item) for item in items}) > 1:
        raise DataError(f"{path}: mixes multiple choice and generation; put them into two files")
    return items


def _item(raw: Mapping[str, Any], task: str, number: str) -> MultipleChoiceItem | GenerationItem:
    item_id = str(raw.get("id", number))
    if "choices" in raw:
        choices, answer = tuple(str(choice) for choice in raw["choices"]), int(raw["answer"])
        if len(choices) < 2 or not 0 <= answer < len(choices) or not isinstance(raw["prompt"], str):
            raise ValueError(f"answer {answer} of {len(choices)} choices")
        return MultipleChoiceItem(task=task, item_id=item_id, prompt=raw["prompt"], choices=choices, answer=answer)
    accepted = tuple(str(word) for word in raw["accepted"])
    wordings = [_messages(messages) for messages in (raw["messages"], *raw.get("rewordings", ()))]
    if not accepted or not all(wordings):
        raise ValueError("messages or accepted is empty")
    match = raw.get("match", "anywhere")
    if match not in _MATCHES:
        raise ValueError(f"match: got {match!r}, expected one of {', '.join(_MATCHES)}")
    return GenerationItem(
        task=task,
        item_id=item_id,
        messages=wordings[0],
        rewordings=tuple(wordings[1:]),
        max_new_tokens=int(raw.get("max_new_tokens", DEFAULT_NEW_TOKENS)),
        score=partial(_MATCHES[match], accepted=accepted),
        chance=float(raw.get("chance", 0.0)),
    )


def _messages(messages: Sequence[Mapping[str, object]]) -> tuple[dict[str, str], ...]:
    return tuple({"role": str(message["role"]), "content": str(message["content"])} for message in messages)
