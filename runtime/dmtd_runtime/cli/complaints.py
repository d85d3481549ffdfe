"""Typer's complaint of an option's value, as our own errors are: the place that it was written in, what was got and expected.

Typer checks values with pydantic and passes its words on; with an older one, which has words of its own, they stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmtd_runtime.cli.places import place_of

_EXPECTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "at most {le}",
}


def reword(error: Any) -> None:
    """Change an error of typer's in place; one of another kind stays as it is."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is not None and parameter is not None and (place := place_of(context, parameter)):
        error.param_hint = place
    if callable(list_errors := getattr(error.__cause__, "errors", None)) and (found := list_errors()):
        error.message = _in_our_words(found[0]) or error.message


def _in_our_words(complaint: Mapping[str, Any]) -> str | None:
    bounds = complaint.get("ctx", {})
    if complaint["type"] in _EXPECTED:
        return f"got {complaint['input']!r}, expected {_EXPECTED[complaint['type']].format(**bounds)}"
    if complaint["type"] == "value_error":  # of choices, which it names
        return str(bounds["error"]).rstrip(".")
    return None
