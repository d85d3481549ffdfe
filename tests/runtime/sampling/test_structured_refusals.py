"""Forms that cannot be enforced: one RequestError before anything has started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from runtime_support import TinyBundle, make_bundle, tokenizer_of
from structured_support import texts, wild

from dmtd_runtime import LLM, RequestError, SamplingParams
from dmtd_runtime.errors import MissingExtraError
from dmtd_runtime.sampling import grammar as grammar_module
from dmtd_runtime.sampling.structured import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH

pytestmark = pytest.mark.timeout(300)


MANY = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(900)}
DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(MAX_SCHEMA_DEPTH):
    DEEP = {"items": DEEP}
CYCLE: dict[str, Any] = {}
CYCLE["properties"] = CYCLE
REFUSED: dict[str, dict[str, Any]] = {
    "no form": {},
    "two forms": {"regex": "a", "choice": ["b"]},
    "object no boolean": {"json_object": "yes"},
    "schema no object": {"json": "[]"},
    "schema true": {"json": "true"},
    "schema no JSON": {"json": "{"},
    "schema not finite": {"json": {"minimum": float("nan")}},
    "schema of sets": {"json": {"enum": {1, 2}}},
    "schema of itself": {"json": CYCLE},
    "schema a number": {"json": 7},
    "schema of an unknown type": {"json": {"type": "strin"}},
    "schema of a wrong type": {"json": {"type": 7}},
    "schema unsatisfiable": {"json": {"allOf": [{"type": "integer"}, {"type": "string"}]}},
    "schema never ends": {"json": {"$ref": "#"}},
    "schema in circles": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}}},
    "schema of too many unions": {
        "json": {"allOf": [{"anyOf": [{"properties": {f"{i} {j}": {}}} for j in range(8)]} for i in range(8)]}
    },
    "schema without what it refers to": {"json": {"$ref": "#/$defs/nothing"}},
    "schema elsewhere": {"json": {"$ref": "https://example.com/schema.json"}},
    "schema in a file": {"json": {"$ref": "file:///etc/passwd"}},
    "schema not enforced: uniqueItems": {"json": {"type": "array", "uniqueItems": True}},
    "schema not enforced: not": {"json": {"not": {"type": "string"}}},
    "schema not enforced: if": {"json": {"if": {"type": "string"}, "then": {"minLength": 3}}},
    "schema not enforced: dependentRequired": {"json": {"type": "object", "dependentRequired": {"a": ["b"]}}},
    "schema not enforced: contains": {"json": {"type": "array", "contains": {"type": "integer"}}},
    "schema not enforced: oneOf": {"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
    "schema not enforced: format": {"json": {"type": "string", "format": "weird"}},
    "schema lenient of itself": {"json": {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}},
    "schema with a bad pattern": {"json": {"type": "string", "pattern": "("}},
    "schema with half a surrogate": {"json": {"const": "\ud800"}},
    "schema too deep": {"json": DEEP},
    "schema too long a chain": {"json": {"$ref": "#/$defs/d0", "$defs": {**MANY, "d900": {"type": "integer"}}}},
    "schema too large": {"json": {"enum": ["x" * MAX_GRAMMAR_BYTES]}},
    "regex no text": {"regex": 7},
    "regex empty": {"regex": ""},
    "regex unclosed": {"regex": "(a"},
    "regex look-ahead": {"regex": "a(?=b)"},
    "regex back-reference": {"regex": r"(a)\1"},
    "regex of nothing": {"regex": r"[^\s\S]"},
    "regex nested": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "regex too large": {"regex": "((((a{100}){100}){100}){100}){100}b*"},
    "regex too long": {"regex": "a" * (MAX_GRAMMAR_BYTES + 1)},
    "choice a text": {"choice": "yes"},
    "choice of none": {"choice": []},
    "choice of numbers": {"choice": [1]},
    "choice empty": {"choice": [""]},
    "choice of too many": {"choice": [str(i) for i in range(5000)]},
    "choice half a surrogate": {"choice": ["\ud83d"]},
    "grammar no text": {"grammar": ["start"]},
    "grammar without a start": {"grammar": 'a: "b"'},
    "grammar of unknown rules": {"grammar": "start: foo"},
    "grammar with NUL": {"grammar": 'start: "\0"'},
    "grammar unfinished": {"grammar": 'start: "a'},
    "grammar nested": {"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000},
    "grammar too long a chain": {
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3000)) + 'r3000: "a"'
    },
    "grammar not enforced": {
        "grammar": 'start: %json {"type": "string", "format": "x", "x-guidance": {"lenient": true}}'
    },
}


@pytest.mark.parametrize("form", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_enforced_is_refused_in_one_line(llm: LLM, form: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate([1, 2], wild(**form))
    assert caught.value.param == "structured_outputs"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_nothing_has_started_and_nothing_has_ended_then(llm: LLM) -> None:
    before = llm.snapshot().prompt_tokens
    with pytest.raises(RequestError, match="structured_outputs"):
        llm.generate([[1], [2]], [SamplingParams(max_tokens=1), wild(regex="(")])
    assert llm.snapshot().prompt_tokens == before
    assert texts(llm, [wild(regex="ok")]) == ["ok"]


def test_a_limit_in_the_middle_ends_its_sequence_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred properties in any order: more than a step of the parser may hold, which shows once it is under way."""
    monkeypatch.setitem(grammar_module._LIMITS, "max_items_in_row", 60)
    many = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(200)}}
    with pytest.raises(RequestError, match="structured_outputs: it cannot be enforced"):
        llm.generate([1, 2], wild(json=many))
    assert texts(llm, [wild(regex="ok")]) == ["ok"]


def test_no_form_without_the_class(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs: got .*expected StructuredOutputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_no_form_without_a_tokenizer(tmp_path: Path) -> None:
    mute = make_bundle(tmp_path, tokenizer=False)
    with (
        LLM(mute.directory, threads=1) as llm,
        pytest.raises(RequestError, match=r"structured_outputs: .*no tokenizer"),
    ):
        llm.generate([1, 2], wild(regex="a"))


def test_a_missing_library_is_told_with_what_to_install(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r'pip install "dmtd\[structured\]"') as caught:
        llm.generate([1, 2], wild(regex="a"))
    assert "\n" not in str(caught.value)


def test_text_of_the_tokenizer_survives(bundle: TinyBundle) -> None:
    """What the library reads has the same ids as the bundle's own file."""
    ours = tokenizer_of(bundle.directory)
    again = tokenizers.Tokenizer.from_str(ours.to_json())
    assert again.encode("Grüße <|im_end|>").ids == ours.encode("Grüße <|im_end|>")
