"""The form that a request wants its answer in: ``response_format`` and ``structured_outputs`` as the runtime's own."""

from __future__ import annotations

import json
from typing import Any

from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling.structured import StructuredOutputs
from dmtd_runtime.server.errors import ApiError, invalid
from dmtd_runtime.server.options import Limits
from dmtd_runtime.server.schema import ResponseFormat, SamplingBody, StructuredOutputsBody

Form = tuple[str, StructuredOutputs]
"""The field that it was given in, and what it is."""


def form_of(body: SamplingBody, limits: Limits) -> Form | None:
    """The form of a chat's or completion's answer; None: any text.

    Raises:
        ApiError: 400; it cannot be one, is larger than this server takes, or was given twice.
    """
    given = [
        _of_format(body.response_format, limits) if body.response_format else None,
        _of_structured(body.structured_outputs, limits) if body.structured_outputs else None,
    ]
    found = [form for form in given if form is not None]
    if len(found) > 1:
        raise invalid("structured_outputs", "response_format says what the answer is already; give one of them")
    return found[0] if found else None


def schema_form(field: str, schema: dict[str, Any], limits: Limits) -> Form:
    """JSON of a schema."""
    check_size(field, schema, limits)
    return made(field, json=schema)


def made(field: str, **form: Any) -> Form:
    """The runtime's own, with its errors under the field's name."""
    try:
        return field, StructuredOutputs(**form)
    except RequestError as error:
        raise ApiError(400, f"{field}: {error.problem}", param=field) from None


def check_size(field: str, form: object, limits: Limits) -> None:
    """Raise ApiError 400 for a form that is larger or deeper than this server takes."""
    text = form if isinstance(form, str) else json.dumps(form)
    size = len(text.encode(errors="surrogatepass"))
    if size > limits.max_schema_bytes:
        raise invalid(field, f"got {size} bytes, expected at most {limits.max_schema_bytes}, this server's limit")
    depth = _depth(form)
    if depth > limits.max_schema_depth:
        raise invalid(field, f"got {depth} levels, expected at most {limits.max_schema_depth}, this server's limit")


def _of_format(given: ResponseFormat, limits: Limits) -> Form | None:
    field = "response_format"
    if given.type == "text":
        return None
    if given.type == "json_object":
        return made(field, json_object=True)
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise invalid(field, "json_schema: expected an object with a schema")
    return schema_form(field, given.json_schema.schema_, limits)


def _of_structured(given: StructuredOutputsBody, limits: Limits) -> Form:
    field = "structured_outputs"
    forms = given.model_dump(exclude_none=True, by_alias=True)
    for value in forms.values():
        check_size(field, value, limits)
    return made(field, **forms)


def _depth(value: object) -> int:
    deepest, left = 0, [(value, 0)]
    while left:
        one, depth = left.pop()
        deepest = max(deepest, depth)
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        left += [(each, depth + 1) for each in inner]
    return deepest
