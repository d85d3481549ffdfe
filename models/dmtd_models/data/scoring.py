"""Checks of answer texts: does one name an accepted word. Text in, 0 or 1 out. ``task_file`` puts these into items."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_STATEMENT_WORDS = 3


def names_one_of(text: str, accepted: Sequence[str]) -> float:
    """1 if one of the accepted answers stands in the text as a word (or words), in any case.

    A number is not found inside a longer one: 12 is in "12." and "(12)", not in "12.5", "112" or "12,000".
    """
    for answer in accepted:
        pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(answer)}(?!\w)(?![.,]\d)"
        if re.search(pattern, text, re.IGNORECASE):
            return 1.0
    return 0.0


def states_one_of(text: str, accepted: Sequence[str]) -> float:
    """The same for the first statement of a text: what a model rambles on about afterwards is not its answer."""
    return names_one_of(first_statement(text), accepted)


def first_statement(text: str) -> str:
    """The first sentence or line; further ones as long as there are fewer than three words ("1.", "Sure!")."""
    said = ""
    for piece in _SENTENCE_END.split(text.strip()):
        said = f"{said} {piece}".strip()
        if len(said.split()) >= _STATEMENT_WORDS:
            break
    return said
