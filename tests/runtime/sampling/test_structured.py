"""Answers of a form, written by a random model: judged by jsonschema, ``re`` and plain comparison, never by the grammar."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from random_schemas import Schemas
from runtime_support import END_OF_TURN, TinyBundle, random_prompt
from structured_support import texts, wild
from tokenizers import AddedToken, decoders, models, normalizers

from dmtd_runtime import LLM, AsyncLLM, RequestError, SamplingParams, StructuredOutputs
from dmtd_runtime.sampling.grammar import GrammarCompiler
from dmtd_runtime.sampling.sampler import Sampler
from dmtd_runtime.sampling.structured import MAX_WHITESPACE
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
