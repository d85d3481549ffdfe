"""Words of errors and of what is printed: values as JSON has them, causes without Python's numbers, counted things."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType

__all__ = ["TYPES", "counted", "kind_of", "reason", "shown"]

TYPES: Mapping[type, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
"""What is expected where a value of a type is."""

_MOST_SHOWN = 60


def shown(value: object) -> str:
    """A value as JSON has it, on one line and short; of Python's own where JSON has none."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        try:
            text = " ".join(repr(value).split())
        except (ValueError, RecursionError):  # integers of thousands of digits refuse to print
            text = f"a value of type {type(value).__name__} too long to print"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def kind_of(value: object) -> str:
    """What kind of JSON a value is, with its article."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a value of type {type(value).__name__}"


def reason(error: BaseException) -> str:
    """Why something failed, on one line: the system's words without number and file, or where text is no UTF-8 or JSON."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} in line {error.lineno}, column {error.colno}"
    return " ".join(str(error).split()) or type(error).__name__


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """So many of something: 1 token, 2 tokens; ``plural`` where it is no s more."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
