"""The form that an answer must have: ``StructuredOutputs``, checked once, when it is made. Names and meanings are vLLM's.

Flow: ``SamplingParams(structured_outputs=StructuredOutputs(json=schema))`` -> ``GrammarCompiler`` (grammar.py). Here are the
bounds that need no library: of size, and of nesting, which a native compiler follows on its stack.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dmtd_errors.words import kind_of, reason, shown
from dmtd_runtime.errors import RequestError

PARAM = "structured_outputs"
MAX_GRAMMAR_BYTES = 128 << 10
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_CHAIN = 1500
"""Levels of nesting with references followed, at most: (distinct ``$ref``s + 1) times the depth of the text."""
MAX_GRAMMAR_RULES = 1000
MAX_CHOICES = 1000
MAX_WHITESPACE = 32
"""Characters of white space between two parts of a JSON text. Without a bound a model may write nothing else."""
JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": rf"[ \n\r\t]{{1,{MAX_WHITESPACE}}}",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
"""llguidance's, over a schema's own wishes: what cannot be enforced is refused, and no part may go on for ever."""
_JSON_PART = "%json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What an answer must be; exactly one field is given. The whole answer is of that form, unless a limit cuts it short.

    Attributes:
        json: A JSON schema: a dict, its JSON text, or a class with ``model_json_schema`` (pydantic's). Kept as JSON text.
            Between its parts the answer has at most ``MAX_WHITESPACE`` characters of white space.
        regex: A regular expression without look-around that matches the whole answer.
        choice: Strings, one of which is the whole answer.
        grammar: A grammar with a rule ``start`` (Lark's notation, as llguidance reads it) or ``root`` (GBNF).
        json_object: True: any JSON object.

    Raises:
        RequestError: None or several of them, the wrong type, or beyond a bound; ``param`` is ``structured_outputs``.
    """

    json: str | Mapping[str, Any] | type | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise _refused(f"json_object: got {shown(self.json_object)}, expected true or false")
        given = [each.name for each in fields(self) if getattr(self, each.name) not in (None, False)]
        if len(given) != 1:
            raise _refused(
                f"got {' and '.join(given) or 'none'}, expected exactly one of json, regex, choice, grammar, json_object"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        elif self.regex is not None:
            _check_text("regex", self.regex)
        elif self.grammar is not None:
            _check_text("grammar", self.grammar)
            _check_rules(self.grammar)

    @property
    def schema_text(self) -> str | None:
        """The JSON schema as JSON text; None where the form is none of JSON."""
        return '{"type": "object"}' if self.json_object else self.json if isinstance(self.json, str) else None


def _schema_text(given: object) -> str:
    """A JSON schema as text without duplicate keys, within the bounds."""
    maker = getattr(given, "model_json_schema", None)
    if callable(maker):
        try:
            given = maker()
        except Exception as error:  # a model may fail in any way
            raise _refused(f"json: {_one_line(error)}; give a model that has a JSON schema") from error
    try:
        text = given if isinstance(given, str) else json.dumps(given, allow_nan=False)
        _check_text("json", text)
        schema = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise _refused(f"json: {_one_line(error)}; give a JSON schema, as an object or its text") from error
    if not isinstance(schema, dict):
        raise _refused(f"json: got {kind_of(schema)}, expected an object that is a JSON schema")
    _check_nesting(schema)
    return json.dumps(schema)


def _check_nesting(schema: object) -> None:
    deepest, references = 0, set()
    for depth, key, value in _walk(schema):
        deepest = max(deepest, depth)
        if key in ("$ref", "$dynamicRef", "$recursiveRef"):
            references.add(str(value))
    if deepest > MAX_SCHEMA_DEPTH:
        raise _refused(f"json: got a schema nested {deepest} deep, expected at most {MAX_SCHEMA_DEPTH}; flatten it")
    if (chain := (len(references) + 1) * deepest) > MAX_SCHEMA_CHAIN:
        raise _refused(
            f"json: got {len(references)} references in a schema nested {deepest} deep, up to {chain} levels, expected at "
            f"most {MAX_SCHEMA_CHAIN}; flatten it or split it"
        )


def _check_rules(grammar: str) -> None:
    """Rules are counted by their colons, schemas (``%json {...}``) by their own bounds."""
    rules, *parts = grammar.split(_JSON_PART)
    for part in parts:
        try:
            schema, end = json.JSONDecoder().raw_decode(part.lstrip())
        except (ValueError, RecursionError) as error:
            raise _refused(f"grammar: {_JSON_PART}: {_one_line(error)}; a JSON schema must follow it") from error
        _check_nesting(schema)
        rules += part.lstrip()[end:]
    if (count := rules.count(":")) > MAX_GRAMMAR_RULES:
        raise _refused(f"grammar: got {count} colons, expected at most {MAX_GRAMMAR_RULES}, one a rule; shorten it")


def _walk(value: object) -> Iterator[tuple[int, str | None, object]]:
    """Every (depth, key, value) of a JSON value."""
    left: list[tuple[int, str | None, object]] = [(0, None, value)]
    while left:
        depth, key, value = left.pop()
        yield depth, key, value
        if isinstance(value, dict):
            left += [(depth + 1, name, item) for name, item in value.items()]
        elif isinstance(value, list):
            left += [(depth + 1, None, item) for item in value]


def _choices(given: object) -> tuple[str, ...]:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise _refused(f"choice: got {kind_of(given)}, expected a list of strings")
    if not 1 <= len(given) <= MAX_CHOICES:
        raise _refused(f"choice: got {len(given)} strings, expected 1 to {MAX_CHOICES}")
    for each in given:
        _check_text("choice", each)
    _check_text("choice", "".join(given))
    return tuple(given)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise _refused(f"{name}: got {kind_of(text)}, expected text")
    if not text:
        raise _refused(f"{name}: got an empty text, expected at least one character")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _refused(
            f"{name}: got half a surrogate pair at character {error.start}, expected text; remove it"
        ) from error
    if size > MAX_GRAMMAR_BYTES:
        raise _refused(f"{name}: got {size} bytes, expected at most {MAX_GRAMMAR_BYTES}; shorten it")


def _one_line(error: BaseException) -> str:
    text = reason(error)
    return text if len(text) <= 200 else text[:197] + "..."


def _refused(problem: str) -> RequestError:
    return RequestError(problem, param=PARAM)
