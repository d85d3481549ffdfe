"""Tool calls out of text: what templates render is read back, pieces give what the whole gives, and nothing is lost."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_support import END_OF_TURN, TinyBundles

from dmtd_runtime import LLM, RequestError, SamplingParams
from dmtd_runtime.sampling.grammar import GrammarCompiler
from dmtd_runtime.text.chat_template import ChatTemplate
from dmtd_runtime.text.tool_calls import (
    ToolCallDelta,
    ToolCallStream,
    ToolFormat,
    forced_calls,
    parse_tool_calls,
    tool_format_of,
)

FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3_json")
# How the families' templates write calls, each in a few words.
QWEN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "{{ '\n</tool_call>' }}{% endfor %}<|im_end|>{% endif %}{% endfor %}"
)
HERMES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant"
    "{% for c in m.tool_calls %}{{ '\n<tool_call>\n' }}"
    '{ "arguments": {{ c.function.arguments | tojson }}, "name": "{{ c.function.name }}"}'
    "{{ '\n</tool_call> ' }}{% endfor %}<|im_end|>{% endif %}{% endfor %}"
)
LLAMA = (
    "{# ipython #}{% for m in messages %}{% if m.role == 'assistant' %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>{% endif %}{% endfor %}"
)
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"city": "Zürich", "days": 3},
    {"text": 'quotes " and \\ and </tool_call> and {braces} ; [',  "n": None, "list": [1.5, [], {"a": True}]},
    {"emoji": "\U0001f600\n\t", "name": "not the name", "arguments": {"name": "x"}},
]  # fmt: skip


def numbered() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"call_{next(numbers)}"


def whole(text: str, format: ToolFormat, names: list[str] | None = None) -> tuple[str, list[tuple[str, str, str]]]:
    content, calls = parse_tool_calls(text, format, names=names, new_id=numbered())
    return content, [(call.id, call.name, call.arguments) for call in calls]


def in_pieces(
    text: str, cuts: list[int], format: ToolFormat, names: list[str] | None = None
) -> tuple[str, list[tuple[str, str, str]]]:
    """As the openai client adds deltas up: names and ids once, strings concatenated, by index."""
    stream = ToolCallStream(format, names=names, new_id=numbered())
    content, calls = "", dict[int, list[str]]()
    edges = [0, *sorted(cuts), len(text)]
    for delta in [*(stream.push(text[a:b]) for a, b in itertools.pairwise(edges)), stream.flush()]:
        content += delta.content
        for call in delta.calls:
            if call.index not in calls:
                assert call.index == len(calls) and call.id and call.name
                calls[call.index] = [call.id, call.name, ""]
            else:
                assert call.id is None and call.name is None
            calls[call.index][2] += call.arguments
    assert stream.num_calls == len(calls)
    return content, [(one[0], one[1], one[2]) for one in calls.values()]


def rendered(template: str, calls: list[tuple[str, dict[str, Any]]], content: str = "") -> str:
    """The assistant's part, as a template writes it: the end of the prompt that the next turn begins with."""
    function_calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": function_calls},
    ]
    text = ChatTemplate(template).render(messages, add_generation_prompt=False)
    for mark in ("<|im_start|>assistant", "<|start_header_id|>assistant<|end_header_id|>", "<|im_end|>", "<|eot_id|>"):
        text = text.replace(mark, "")
    return text


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("template", [QWEN, HERMES, LLAMA], ids=["qwen", "hermes", "llama"])
def test_a_rendered_call_is_read_back(template: str, arguments: dict[str, Any]) -> None:
    format = tool_format_of(template)
    assert format is not None
    content, [(_, name, read)] = whole(rendered(template, [("look_up", arguments)]), format)
    assert (content, name, json.loads(read)) == ("", "look_up", arguments)


@pytest.mark.parametrize("template", [QWEN, HERMES], ids=["qwen", "hermes"])
def test_rendered_calls_in_parallel(template: str) -> None:
    wanted = [(f"f{i}", arguments) for i, arguments in enumerate(ARGUMENTS)]
    content, calls = whole(rendered(template, wanted, content="Let me see."), "hermes")
    assert content.lstrip() == ("Let me see." if template == QWEN else "")
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == wanted
    assert [call_id for call_id, _, _ in calls] == ["call_0", "call_1", "call_2", "call_3"]


def test_the_format_of_a_template() -> None:
    assert [tool_format_of(t) for t in (QWEN, HERMES, LLAMA)] == ["hermes", "hermes", "llama3_json"]
    assert tool_format_of("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert tool_format_of("<tool_call>\n<function=name>") is None  # Qwen3-Coder's, another format


CALL = '{"name": "f", "arguments": {"a": 1}}'
LLAMA_CALL = '{"name": "f", "parameters": {"a": 1}}'
F = ("call_0", "f", '{"a": 1}')
CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str, str]]]] = [
    ("hermes", "", "", []),
    ("hermes", "  just text \n", "  just text \n", []),
    ("hermes", f"<tool_call>{CALL}</tool_call>", "", [F]),
    ("hermes", f" \n<tool_call>\n{CALL}\n</tool_call>\n", "", [F]),
    ("hermes", f"Well.\n\n<tool_call>{CALL}</tool_call>\nDone.", "Well.Done.", [F]),
    ("hermes", f"<tool_call>{CALL}", "", [F]),  # without its end
    ("hermes", f"<tool_call>{CALL[:-1]}\n</tool_call>", "", [F]),  # a bracket short
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("call_0", "f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("call_0", "f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),  # JSON in a string
    ("hermes", '<tool_call>{"id": 7, "x": [{"name": 1}], "arguments": {"a": 1}, "name": "f"}</tool_call>', "", [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', "", [("call_0", "f", '{"a": ')]),  # cut short
    ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    ("hermes", "a <tool_call>no JSON</tool_call> b", "a <tool_call>no JSON</tool_call> b", []),
    ("hermes", '<tool_call>{"name": 7}</tool_call>', '<tool_call>{"name": 7}</tool_call>', []),
    ("hermes", f"a < b <tool_ca <tool_call>{CALL}</tool_call>", "a < b <tool_ca", [F]),
    ("hermes", "a stray </tool_call> mark", "a stray </tool_call> mark", []),
    ("hermes", '<tool_call>{"name": "\\ud800"}</tool_call>', '<tool_call>{"name": "\\ud800"}</tool_call>', []),
    ("llama3_json", LLAMA_CALL, "", [F]),
    ("llama3_json", CALL, "", [F]),
    ("llama3_json", f"<|python_tag|>{LLAMA_CALL}", "", [F]),
    ("llama3_json", f"\n {LLAMA_CALL}; {LLAMA_CALL}\n", "", [F, ("call_1", "f", '{"a": 1}')]),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [F]),
    ("llama3_json", f"Sure: {LLAMA_CALL}", f"Sure: {LLAMA_CALL}", []),
    ("llama3_json", '{"name": "Bob", "age": 7}', '{"name": "Bob", "age": 7}', []),
    ("llama3_json", '{"name": "g", "parameters": {}}', '{"name": "g", "parameters": {}}', []),  # no such function
    ("llama3_json", '<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', []),
    ("llama3_json", '{"a": 1} and more', '{"a": 1} and more', []),
    ("llama3_json", "  \n", "  \n", []),
    ("llama3_json", f"{LLAMA_CALL} and more", "and more", [F]),
]


@pytest.mark.parametrize(("format", "text", "content", "calls"), CASES)
def test_whole_and_in_pieces(format: ToolFormat, text: str, content: str, calls: list[tuple[str, str, str]]) -> None:
    assert whole(text, format, ["f"]) == (content, calls)
    assert in_pieces(text, list(range(len(text))), format, ["f"]) == (content, calls)  # letter by letter
    for cut in range(len(text)):
        assert in_pieces(text, [cut], format, ["f"]) == (content, calls)


FRAGMENTS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "{", "}", '"name"', '"arguments"', '"parameters"', ":", ",",
             '"f"', '"', "\\", "null", "[", "]", " ", "\n", ";", "é", "<", CALL, LLAMA_CALL, "text"]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.randoms(use_true_random=False), st.sampled_from(FORMATS))
def test_how_text_is_cut_changes_nothing(parts: list[str], chance: random.Random, format: ToolFormat) -> None:
    text = "".join(parts)
    cuts = [chance.randrange(len(text) + 1) for _ in range(chance.randrange(6))]
    content, calls = whole(text, format)
    assert in_pieces(text, cuts, format) == (content, calls)
    if not calls:
        assert content == text  # nothing is lost


def test_arguments_are_told_as_they_are_written() -> None:
    stream = ToolCallStream("hermes", new_id=numbered())
    assert stream.push('<tool_call>{"name": "f", "argu').calls == ()
    assert stream.push('ments": {"a').calls == (ToolCallDelta(index=0, id="call_0", name="f", arguments='{"a'),)
    assert stream.push('": 1').calls == (ToolCallDelta(index=0, arguments='": 1'),)
    assert stream.push("}}</tool").calls == (ToolCallDelta(index=0, arguments="}"),)
    assert stream.push("_call>") == stream.flush()


def test_ids_are_told_apart() -> None:
    _, calls = parse_tool_calls(f"<tool_call>{CALL}</tool_call>" * 9, "hermes")
    assert len({call.id for call in calls}) == 9


# -- forced calls

FUNCTIONS: dict[str, dict[str, Any] | None] = {
    "weather": {
        "type": "object",
        "properties": {"unit": {"$ref": "#/$defs/unit"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["unit"],
        "additionalProperties": False,
        "$defs": {"unit": {"enum": ["C", "F"]}},
    },
    'odd "name"': {"type": "object", "properties": {"b": {"type": "boolean"}}, "additionalProperties": False},
    "now": None,
}


@pytest.fixture(scope="module")
def llm(tiny: TinyBundles) -> Iterator[LLM]:
    with LLM(tiny.get().directory, max_num_seqs=8, threads=1) as llm:
        yield llm


@pytest.mark.parametrize("format", FORMATS)
def test_a_forced_call_is_a_call_to_a_given_function(llm: LLM, format: ToolFormat) -> None:
    assert llm.tokenizer is not None
    calmed = {llm.tokenizer.encode(char)[0]: -6.0 for char in " \n\t\r"}
    form = forced_calls(format, FUNCTIONS)
    params = [SamplingParams(temperature=2.0, seed=s, logit_bias=calmed, structured_outputs=form) for s in range(12)]
    outputs = llm.generate([[s] for s in range(12)], params)
    seen = set()
    for output in outputs:
        assert output.outputs[0].finish_reason == "stop"
        content, [(_, name, arguments)] = whole(output.outputs[0].text, format, list(FUNCTIONS))
        assert content == ""
        jsonschema.validate(json.loads(arguments), FUNCTIONS[name] or {"maxProperties": 0})
        seen.add(name)
    assert len(seen) > 1
    only = SamplingParams(seed=1, logit_bias=calmed, structured_outputs=forced_calls(format, {"now": None}))
    assert whole(llm.generate([1], only)[0].outputs[0].text, format)[1][0][1] == "now"


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("template", "format"), [(QWEN, "hermes"), (LLAMA, "llama3_json")])
def test_the_form_takes_what_templates_write(llm: LLM, template: str, format: ToolFormat, parallel: bool) -> None:
    """To the letter, and as many calls as may be."""
    assert llm.tokenizer is not None
    compiler = GrammarCompiler(llm.tokenizer, vocab_size=259, eos_token_ids=(END_OF_TURN,))
    state = compiler.compile(forced_calls(format, FUNCTIONS, parallel=parallel)).start()
    calls: list[tuple[str, dict[str, Any]]] = [("weather", {"unit": "C", "days": 3}), ("now", {})]
    several = parallel and format == "hermes"
    for token_id in llm.tokenizer.encode(rendered(template, calls if several else calls[:1]).strip()):
        assert state.allowed()[token_id]
        state.observe(token_id)
    assert state.allowed()[END_OF_TURN]
    assert state.complete is not several


def test_what_cannot_be_forced_is_refused(llm: LLM) -> None:
    chain = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(900)}
    for functions in ({}, {"f": {"$ref": "#/$defs/d0", "$defs": chain}}, {"f": {"type": "strin"}}):
        with pytest.raises(RequestError, match="structured_outputs"):
            llm.generate([1], SamplingParams(structured_outputs=forced_calls("hermes", functions)))
