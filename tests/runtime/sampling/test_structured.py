"""Answers of a form, written by a random model: judged by jsonschema, ``re`` and plain comparison, never by the grammar."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from random_schemas import Schemas
from runtime_support import END_OF_TURN, TinyBundle, make_bundle, random_prompt, tokenizer_of
from tokenizers import AddedToken, decoders, models, normalizers

from dmtd_runtime import LLM, AsyncLLM, RequestError, SamplingParams, StructuredOutputs
from dmtd_runtime.errors import MissingExtraError
from dmtd_runtime.sampling import grammar as grammar_module
from dmtd_runtime.sampling.grammar import GrammarCompiler
from dmtd_runtime.sampling.sampler import Sampler
from dmtd_runtime.sampling.structured import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH, MAX_WHITESPACE
from dmtd_runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(300)

SCHEMAS, SLOW_SCHEMAS = 25, 1000
SMALL_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("structured"), max_positions=1024)


@pytest.fixture(scope="module")
def llm(bundle: TinyBundle) -> Iterator[LLM]:
    with LLM(bundle.directory, max_num_seqs=8, threads=1, prefix_cache_bytes=0) as llm:
        yield llm


def wild(seed: int = 1, *, temperature: float = 2.0, max_tokens: int = 900, **form: Any) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputs(**form)
    )


def texts(llm: LLM, params: Sequence[SamplingParams]) -> list[str]:
    """Answers that are complete."""
    outputs = [output.outputs[0] for output in llm.generate([random_prompt(i, 4) for i in range(len(params))], params)]
    assert [output.finish_reason for output in outputs] == ["stop"] * len(params)
    return [output.text for output in outputs]


# -- JSON


def check_schemas(llm: LLM, seeds: Sequence[int]) -> None:
    """Answers at temperature 2 satisfy their schemas. White space is dampened and ends are liked, to have them end."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    ids = {text: tokenizer.encode(text)[0] for text in (" ", "\n", "\t", "\r", '"', "}", "]", ",")}
    bias = {ids[c]: -4.0 for c in " \n\t\r"} | {ids[c]: 6.0 for c in '"}],'}
    schemas = [Schemas(seed).make() for seed in seeds]
    params = [
        SamplingParams(
            temperature=2.0,
            seed=seed,
            max_tokens=1000,
            logit_bias=bias,
            structured_outputs=StructuredOutputs(json=schema),
        )
        for seed, schema in zip(seeds, schemas, strict=True)
    ]
    outputs = llm.generate([[7, seed % 256] for seed in seeds], params)
    ended = 0
    for seed, schema, output in zip(seeds, schemas, outputs, strict=True):
        if output.outputs[0].finish_reason == "stop":
            ended += 1
            checker = jsonschema.Draft202012Validator(
                schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
            error = jsonschema.exceptions.best_match(checker.iter_errors(json.loads(output.outputs[0].text)))
            assert error is None, f"schema {seed}: {error}"
    assert ended > 0.95 * len(seeds), f"{ended} of {len(seeds)} answers ended"


def test_every_answer_satisfies_its_schema(llm: LLM) -> None:
    check_schemas(llm, range(SCHEMAS))


@pytest.mark.slow
def test_every_answer_satisfies_its_schema_of_many(llm: LLM) -> None:
    check_schemas(llm, range(SCHEMAS, SCHEMAS + SLOW_SCHEMAS))


def test_a_schema_as_dict_text_or_model_is_the_same(llm: LLM) -> None:
    class Person:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return SMALL_PERSON

    forms: list[Any] = [SMALL_PERSON, json.dumps(SMALL_PERSON), Person]
    made = {texts(llm, [wild(json=form)])[0] for form in forms}
    assert len(made) == 1
    jsonschema.validate(json.loads(made.pop()), SMALL_PERSON)
    assert len({SamplingParams(structured_outputs=StructuredOutputs(json=form)) for form in forms}) == 1


def test_any_object(llm: LLM) -> None:
    answers = texts(llm, [wild(seed, json_object=True) for seed in range(3, 6)])
    assert all(isinstance(json.loads(answer), dict) for answer in answers)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
        {"type": "array", "x-guidance": {"whitespace_pattern": "[ \\n]*", "lenient": True}},
    ],
)
def test_white_space_is_bounded(llm: LLM, schema: dict[str, Any]) -> None:
    """A model that writes white space wherever it may comes to an end of it."""
    state = compiler(llm).compile(StructuredOutputs(json=schema)).start()
    assert llm.tokenizer is not None
    blanks = [llm.tokenizer.encode(c)[0] for c in " \n\r\t"]
    state.observe(llm.tokenizer.encode("[" if schema["type"] == "array" else "{")[0])
    for _ in range(MAX_WHITESPACE):
        assert state.allowed()[blanks].all()
        state.observe(blanks[1])
    assert not state.allowed()[blanks].any()


# -- other forms


@pytest.mark.parametrize(
    "pattern",
    ["(ab|c)+d?", "[0-9]{3}-[A-F]{2}", "^(yes|no)$", "[^a]{4}", r"\d{1,3}(\.\d{1,3}){3}", "(?i)ja", "a*", "[ä-ü]+"],
)
def test_regular_expressions(llm: LLM, pattern: str) -> None:
    for answer in texts(llm, [wild(seed, regex=pattern) for seed in range(4)]):
        assert re.fullmatch(pattern, answer), (pattern, answer)


def test_choices(llm: LLM) -> None:
    choices = ["yes", "yesterday", "größe\n", '"\\', "\U0001f600"]
    answers = texts(llm, [wild(seed, choice=choices) for seed in range(24)])
    assert set(answers) <= set(choices)
    assert len(set(answers)) > 2


@pytest.mark.parametrize(
    "grammar",
    [
        'start: term (("+" | "-") term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,2}/',
        'root ::= term (("+" | "-") term)*\nterm ::= [0-9] [0-9]? | "(" root ")"',
    ],
    ids=["lark", "gbnf"],
)
def test_a_grammar_of_sums(llm: LLM, grammar: str) -> None:
    for answer in texts(llm, [wild(seed, grammar=grammar) for seed in range(4)]):
        assert set(answer) <= set("0123456789+-()")
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", answer)), int)


def test_the_end_where_nothing_may_follow_and_where_it_is_chosen(llm: LLM) -> None:
    [closed] = llm.generate([1, 2], wild(regex="ab"))
    assert (closed.outputs[0].text, closed.outputs[0].finish_reason, closed.outputs[0].stop_reason) == (
        "ab",
        "stop",
        None,
    )
    assert len(closed.outputs[0].token_ids) == 2
    [chosen] = llm.generate([1, 2], wild(regex="[ab]+"))
    assert (chosen.outputs[0].finish_reason, chosen.outputs[0].stop_reason) == ("stop", END_OF_TURN)
    assert re.fullmatch("[ab]+", chosen.outputs[0].text)


def test_ignored_and_late_ends_come_only_where_nothing_else_may(llm: LLM) -> None:
    form = StructuredOutputs(regex="[ab]{1,9}")
    for options in ({"ignore_eos": True}, {"min_tokens": 20}):
        params = [SamplingParams(seed=s, max_tokens=30, structured_outputs=form, **options) for s in range(4)]
        assert {len(text) for text in texts(llm, params)} == {9}
    params = [SamplingParams(seed=s, max_tokens=30, structured_outputs=form, min_tokens=5) for s in range(9)]
    lengths = [len(text) for text in texts(llm, params)]
    assert min(lengths) in range(5, 9) and max(lengths) <= 9


def test_the_cap_on_tokens_ends_it(llm: LLM) -> None:
    [output] = llm.generate([1, 2], wild(regex="a{50,}", max_tokens=7))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("a" * 7, "length")


# -- company


def test_neighbours_get_what_they_get_alone(llm: LLM) -> None:
    prompts = [random_prompt(i, 5) for i in range(6)]
    free = [SamplingParams(temperature=i % 2, seed=i, max_tokens=40, ignore_eos=True) for i in range(3)]
    formed = [wild(i, json=SMALL_PERSON) for i in range(3)]
    params = [one for pair in zip(free, formed, strict=True) for one in pair]
    alone = [llm.generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    assert together == alone


def test_several_sequences_of_a_request_go_their_own_ways(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=900, structured_outputs=StructuredOutputs(regex="[a-p]{12}"))
    [output] = llm.generate([1, 2], params)
    answers = [one.text for one in output.outputs]
    assert all(re.fullmatch("[a-p]{12}", answer) for answer in answers)
    assert len(set(answers)) == 3


def test_streams(llm: LLM, bundle: TinyBundle) -> None:
    params = wild(5, json=SMALL_PERSON)
    [whole] = llm.generate([1, 2], params)
    assert "".join(delta.text for delta in llm.stream([1, 2], params)) == whole.outputs[0].text

    async def streamed() -> str:
        async with AsyncLLM(bundle.directory, threads=1) as llm:
            with pytest.raises(RequestError, match="structured_outputs"):
                await llm.generate([1, 2], wild(regex="(")).result()
            return (await llm.generate([1, 2], params).result()).outputs[0].text

    assert asyncio.run(streamed()) == whole.outputs[0].text


def test_log_probabilities_are_the_models(llm: LLM) -> None:
    """The first token's, beside a free request at the same place: the form changes what is chosen, not how likely it was."""
    form = StructuredOutputs(regex="z+")
    [formed] = llm.generate([3, 4], SamplingParams(temperature=0, max_tokens=1, logprobs=2, structured_outputs=form))
    [free] = llm.generate([3, 4], SamplingParams(temperature=0, max_tokens=1, logprobs=2))
    assert formed.outputs[0].text == "z"
    assert formed.outputs[0].logprobs is not None and free.outputs[0].logprobs is not None
    assert formed.outputs[0].logprobs[0].top == free.outputs[0].logprobs[0].top
    assert formed.outputs[0].logprobs[0].logprob < free.outputs[0].logprobs[0].logprob


# -- masks


def compiler(llm: LLM, vocab_size: int | None = None) -> GrammarCompiler:
    return GrammarCompiler(
        llm.tokenizer, vocab_size=vocab_size or llm.manifest.model.vocab_size, eos_token_ids=(END_OF_TURN,)
    )


@pytest.mark.parametrize("vocab_size", [200, 259, 260, 288, 301])
def test_logits_without_text_are_never_allowed(llm: LLM, vocab_size: int) -> None:
    """Fewer logits than the tokenizer has ids, as many, or more: padding of the head."""
    state = compiler(llm, vocab_size).compile(StructuredOutputs(regex="[^b]*")).start()
    allowed = state.allowed()
    assert allowed.shape == (vocab_size,) and allowed.dtype == np.bool_
    assert llm.tokenizer is not None
    assert allowed[llm.tokenizer.encode("a")[0]] and not allowed[llm.tokenizer.encode("b")[0]]
    assert not allowed[259:].any()
    assert not allowed[256:END_OF_TURN].any()  # other special tokens
    if vocab_size > END_OF_TURN:
        assert allowed[END_OF_TURN]


@pytest.mark.parametrize("pattern", ["(ab){1,5}", "ab ab ab", "[ä-ü]{3}", "a( ab)*"])
def test_tokens_of_sentencepiece(pattern: str) -> None:
    """Spaces are marks there, and letters without a token are bytes: any allowed tokens give text of the form."""
    core = sentencepiece_like()
    tokenizer = Tokenizer(core, eos_token_ids=(2,))
    grammar = GrammarCompiler(tokenizer, vocab_size=320, eos_token_ids=(2,)).compile(StructuredOutputs(regex=pattern))
    for seed in range(10):
        state, stream, chance, text = grammar.start(), tokenizer.text_stream(), random.Random(seed), ""
        while not state.complete:
            token_id = chance.choice(np.flatnonzero(state.allowed()).tolist())
            state.observe(token_id)
            text += stream.push(token_id)
        assert re.fullmatch(pattern, text + stream.flush())


def sentencepiece_like() -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdef", "ab", "▁a", "▁ab"]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[("a", "b"), ("▁", "a"), ("▁", "ab")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return core


def test_the_mask_comes_before_every_option(llm: LLM) -> None:
    state = compiler(llm).compile(StructuredOutputs(choice=["a", "b"])).start()
    assert llm.tokenizer is not None
    a, b, c = (llm.tokenizer.encode(letter)[0] for letter in "abc")
    params = SamplingParams(
        temperature=0,
        logit_bias={c: 100.0, b: 5.0},
        repetition_penalty=1.5,
        presence_penalty=1.0,
        structured_outputs=StructuredOutputs(choice=["a", "b"]),
    )
    sampler = Sampler(params, vocab_size=259, prompt_ids=[a, c], seed=0, form=state)
    assert sampler.needs_logits and sampler.needs_host and not sampler.complete
    assert sampler.choose(np.zeros(259, np.float32)).token_id == b
    assert sampler.complete


# -- refusals

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
