"""A user's prompts for the base model to answer: ``read_questions(path)``.

A file of data (see ``dmtd_models.data.rows``) whose records have ``messages`` (what follows the last user turn is left out, so a
file of chats serves) or ``prompt`` (one user turn), or a text file with a prompt a line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmtd_models.data.errors import DataError
from dmtd_models.data.rows import SUFFIXES, Row, read_rows

Conversation = tuple[dict[str, str], ...]


def read_questions(path: Path) -> list[Conversation]:
    """Conversations that end in a user turn, in the file's order.

    Raises:
        DataError: a file that is not there, a record that asks nothing, or no record at all.
    """
    try:
        if path.is_file() and path.suffix not in SUFFIXES:
            lines = path.read_text(encoding="utf-8").splitlines()
            found = [_turn(line.strip()) for line in lines if line.strip()]
        else:
            found = [_asked(row) for row in read_rows(path)]
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(str(error), param="questions") from error
    if not found:
        raise DataError(f"{path}: got no prompts, expected one or more", param="questions")
    return found


def _turn(text: str) -> Conversation:
    return ({"role": "user", "content": text},)


def _asked(row: Row) -> Conversation:
    prompt, messages = row.values.get("prompt"), row.values.get("messages")
    if isinstance(prompt, str) and prompt.strip():
        return _turn(prompt)
    try:
        said: list[dict[str, Any]] = [dict(message) for message in messages or ()]
        turns = [{"role": str(one["role"]), "content": one["content"]} for one in said]
    except (TypeError, ValueError, KeyError):
        turns = []
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns or not all(isinstance(turn["content"], str) and turn["content"].strip() for turn in turns):
        raise DataError(
            f"{row.where}: got neither a `prompt` nor `messages` with a user turn in words, expected one of them"
        )
    return tuple(turns)
