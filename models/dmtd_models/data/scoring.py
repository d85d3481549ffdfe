"""Checks of answer texts: does it name an accepted word, is its final number the expected one. Text in, 0 or 1 out.

``tasks.py`` puts these into items. Nothing here runs code (``code_runner.py`` does) or knows a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED_NUMBER = re.compile(r"####\s*\$?(-?[\d,]*\d(?:\.\d+)?)")
_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_STATED = re.compile(r"\banswer(?:\s+is)?\s*[:=]?\s+(.+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_STATEMENT_WORDS = 3
_TOLERANCE = 1e-6


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


def final_number(text: str) -> float | None:
    """The number after the last ``####``, or else the last number of the text; None if it has none."""
    found = _MARKED_NUMBER.findall(text) or _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def ends_in_number(text: str, expected: float) -> float:
    """1 if the final number is the expected one."""
    got = final_number(text)
    return float(got is not None and abs(got - expected) <= _TOLERANCE * max(1.0, abs(expected)))


def stated_answer(text: str) -> str:
    """What a text states as its answer: between <answer> tags, after "answer is" or "answer:", or its last line."""
    tagged = _TAGGED.findall(text)
    if tagged:
        return str(tagged[-1])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    stated = _STATED.findall(text)
    last = stated[-1] if stated else (lines[-1] if lines else "")
    return str(last).strip().strip("*`$ ").removesuffix(".").strip("*`$ ")


def code_of(text: str, name: str) -> str:
    """The Python code of an answer: the fenced block that defines ``name``, else the first block, else all of it."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    defining = [block for block in blocks if re.search(rf"^def {re.escape(name)}\b", block, re.MULTILINE)]
    return str((defining or blocks or [text])[0])
