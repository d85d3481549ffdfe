"""The table of fields: whole against the schemas of OpenAI's API, held to the models, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from dmtd_runtime.server import schema
from dmtd_runtime.server.fields import TABLE, Endpoint, RefusedField, honoured_fields

MODELS: dict[Endpoint, type[schema.RequestBody]] = {
    "chat": schema.ChatBody,
    "completions": schema.CompletionBody,
    "responses": schema.ResponsesBody,
    "tokenize": schema.TokenizeBody,
    "detokenize": schema.DetokenizeBody,
}
OPENAI: dict[Endpoint, type] = {
    "chat": chat_create_params.CompletionCreateParamsBase,
    "completions": completion_create_params.CompletionCreateParamsBase,
    "responses": response_create_params.ResponseCreateParamsBase,
}


@pytest.mark.parametrize("endpoint", OPENAI)
def test_every_field_of_openai_stands_in_the_table(endpoint: Endpoint) -> None:
    assert set(OPENAI[endpoint].__annotations__) - set(TABLE[endpoint]) == set()


@pytest.mark.parametrize("endpoint", MODELS)
def test_honoured_fields_are_those_of_the_model(endpoint: Endpoint) -> None:
    honoured = {name for name, row in TABLE[endpoint].items() if row.use == "honoured"}
    assert honoured == set(MODELS[endpoint].model_fields)


@pytest.mark.parametrize(
    ("endpoint", "name"), [(e, n) for e, rows in TABLE.items() for n, r in rows.items() if r.use == "refused"]
)
def test_refused_fields_are_named(endpoint: Endpoint, name: str) -> None:
    row = TABLE[endpoint][name]
    for value in ("something", 17, {"a": 1}, [1], True):
        if any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in row.neutral):
            continue
        with pytest.raises(RefusedField) as caught:
            honoured_fields(endpoint, {name: value})
        assert str(caught.value).startswith(f"{name}: ") and caught.value.name == name and row.why
    for neutral in (None, *([] if each == () else each for each in row.neutral)):
        assert honoured_fields(endpoint, {name: neutral}) == {}


def test_harmless_fields_are_dropped_and_unknown_ones_refused() -> None:
    given: dict[str, Any] = {"user": "me", "metadata": {"a": "b"}, "store": True, "seed": 1, "n": None}
    assert honoured_fields("chat", given) == {"seed": 1}
    for name in ("tempurature", "", "\n\x1b[31m"):
        with pytest.raises(RefusedField, match="knows no such field"):
            honoured_fields("chat", {name: 1})
