"""What pydantic and FastAPI complain of, in the words of our own errors: ``stop: got 1, expected text or a list of text``.

A complaint names the place in a model; the model's types say what was expected there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dmtd_errors.words import TYPES
from dmtd_runtime.server.errors import ApiError, invalid
from dmtd_runtime.server.fields import RefusedField, shown_name

_MOST_SHOWN = 40
_SEVERAL = {"an integer": "integers", "a number": "numbers", "text": "texts", "an object": "objects"}


def of_validation(model: type[BaseModel], errors: Sequence[Mapping[str, Any]], body: Any, *, at: str = "") -> ApiError:
    """The first complaint as 400. ``at``: where ``body`` stands in the request, if it is not all of it."""
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RefusedField):
        return ApiError(400, str(cause), param=cause.name, code="unsupported_parameter")
    if isinstance(cause, ValueError):  # of a model's own rules, which name the field first
        return ApiError(400, str(cause), param=str(cause).partition(":")[0])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {_lower(cause)} at character {first['loc'][-1]}")
    path, problem = _found(model, errors, body)
    place = (at + "".join(path)).removeprefix(".")
    if not place:
        missing = first["type"] == "missing"
        return ApiError(400, f"the body is {'empty' if missing else shown(body)}, expected a JSON object")
    return invalid(place, problem)


def of_unreadable(error: HTTPException) -> ApiError | None:
    """400 for a body that was not even JSON; None: something else went wrong."""
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return ApiError(400, f"the body is not UTF-8: {cause.reason} at byte {cause.start}; send JSON in UTF-8")
    if isinstance(cause, RecursionError):
        return ApiError(400, "the body is nested too deeply; send fewer levels")
    if isinstance(cause, ValueError):  # Python's bound of an integer's digits
        return ApiError(400, "the body has a number of too many digits; send a smaller one")
    return None


def shown(value: Any) -> str:
    """A value in an error: whole if it is short, else its kind."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def _found(model: type[BaseModel], errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[list[str], str]:
    """Where the complaint is, and what it says."""
    error, path, hint, value = errors[0], list[str](), model, body
    left = [part for part in error["loc"] if part != "body"]
    if error["type"] == "recursion_depth_exceeded":
        return [f".{left[0]}"], "nested too deeply; send fewer levels"
    while left:
        kinds = _kinds(hint)
        # Of a union one complaint for each type: that of the only one which describes such a value, if it goes deeper.
        if len(kinds) > 1:
            depth, kind = len(error["loc"]) - len(left), _only_fitting(kinds, value)
            deeper = [each for each in errors if len(each["loc"]) > depth + 1 and _tells_of(each["loc"][depth], kind)]
            if not deeper:
                return path, f"got {shown(value)}, expected {_words(hint)}"
            error, kinds = deeper[0], [kind]
            left = list(error["loc"][depth + 1 :])
        hint, part = kinds[0], left.pop(0)
        path.append(f"[{part}]" if isinstance(part, int) else f".{shown_name(part)}")
        hint, value = _inside(hint, part), _item(value, part)
    return path, _problem(error, hint, value)


def _problem(error: Mapping[str, Any], hint: Any, value: Any) -> str:
    bounds = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return "this server knows no such key; leave it out"
        case "missing":
            return f"missing, expected {_words(hint)}"
        case "greater_than_equal":
            expected = f"{bounds['ge']} or more"
        case "too_short":
            expected = f"{bounds['min_length']} or more in it"
        case "string_too_short":
            expected = f"text of at least {bounds['min_length']} character"
        case "string_too_long":
            expected = f"text of at most {bounds['max_length']} characters"
        case "string_pattern_mismatch":
            expected = f"text like {bounds['pattern']}"
        case "finite_number":
            expected = "a finite number"
        case _:
            expected = _words(hint)
    return f"got {shown(value)}, expected {expected}"


def _kinds(hint: Any) -> list[Any]:
    """The types of a union but null; a type that is none."""
    if get_origin(hint) in (Union, UnionType):
        return [each for each in get_args(hint) if each is not NoneType]
    return [hint]


def _only_fitting(kinds: Sequence[Any], value: Any) -> Any:
    """The only type of a union that describes an object or a list, as the value is one."""
    if isinstance(value, Mapping):
        fitting = [kind for kind in kinds if _is_model(kind)]
    else:
        fitting = [kind for kind in kinds if get_origin(kind) is list] if isinstance(value, list) else []
    return fitting[0] if len(fitting) == 1 else None


def _tells_of(tag: object, kind: Any) -> bool:
    """Whether a complaint's place in a union is this type's."""
    return kind is not None and str(tag).startswith("list[" if get_origin(kind) is list else kind.__name__)


def _is_model(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _inside(hint: Any, part: int | str) -> Any:
    """The type of a field or an item."""
    if _is_model(hint):
        return next((each.annotation for name, each in hint.model_fields.items() if part in (name, each.alias)), Any)
    arguments = get_args(hint)
    return arguments[-1] if arguments else Any


def _item(value: Any, part: int | str) -> Any:
    try:
        return value[part]
    except (LookupError, TypeError):
        return None


def _words(hint: Any) -> str:
    """What a type takes."""
    kinds = _kinds(hint)
    words = [word for kind in kinds for word in _words_of_one(kind)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else "null"


def _words_of_one(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(each) for each in get_args(kind)]
    if get_origin(kind) is list:
        inner = _words(get_args(kind)[0])
        return [f"a list of {_SEVERAL.get(inner, inner.replace('a list', 'lists', 1))}"]
    if kind is None:
        return ["null"]
    return [TYPES.get(kind, "an object" if _is_model(kind) or get_origin(kind) is dict else "JSON")]


def _lower(text: Any) -> str:
    return f"{str(text)[:1].lower()}{str(text)[1:]}"
