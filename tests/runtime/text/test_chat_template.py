"""Chat templates: exact texts, the same as transformers, attacks refused, bad messages named."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dmtd_runtime.errors import BundleError, RequestError
from dmtd_runtime.text.chat_template import ChatTemplate

# What SmolLM2-Instruct ships (Apache-2.0).
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Written for this test with the constructions that Qwen's templates use: tools, namespaces, reversed loops, thinking.
QWEN_LIKE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "Tools:" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.last_query = index %}
        {%- set ns.searching = false %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- if '</think>' in content and loop.index0 < ns.last_query %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- content }}{% endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' ~ (call.function | tojson(indent=2)) ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA_LIKE = """\
{{ bos_token }}
{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% if message.role == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
  {% else %}
 {{ message['content'] }} {{ eos_token }}
  {% endif %}
{% endfor %}
"""

USER = {"role": "user", "content": "Hi <b>&amp; ünïcode 😀"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nLet me look.",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "Zürich <now>"}}}],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "Thanks\n"},
]
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "é": [1, 2.5, None, True]}}}
]


def template(source: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, **{"special_tokens": {"bos_token": "<s>", "eos_token": "</s>"}, **options})


# -- exact texts


def test_smollm2_by_hand() -> None:
    assert template(SMOLLM2).render([USER]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi <b>&amp; ünïcode 😀<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own_system = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert template(SMOLLM2).render(own_system, add_generation_prompt=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    )


def test_qwen_like_by_hand() -> None:
    assert template(QWEN_LIKE).render(CHAT, chat_template_kwargs={"enable_thinking": False}) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\nLet me look.\n"
        '<tool_call>{\n  "name": "look",\n  "arguments": {\n    "at": "Zürich <now>"\n  }\n}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n"
        "<|im_start|>assistant\nSunny.<|im_end|>\n"
        "<|im_start|>user\nThanks\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_llama_like_by_hand() -> None:
    messages = [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert template(LLAMA_LIKE).render(messages) == "<s>\n[INST] a [/INST]\n b </s>\n[INST] c [/INST]\n"
    with pytest.raises(RequestError, match=r"Conversation roles must alternate user/assistant"):
        template(LLAMA_LIKE).render(messages[1:])


@pytest.mark.parametrize("source", [SMOLLM2, QWEN_LIKE, LLAMA_LIKE], ids=["smollm2", "qwen_like", "llama_like"])
@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_same_text_as_transformers(source: str, with_tools: bool, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, "a"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    chats: list[list[dict[str, Any]]] = [[USER]]
    if source != LLAMA_LIKE:
        chats.append(CHAT[1:2] + CHAT[4:])
    if source == QWEN_LIKE:
        chats.append(CHAT)
    for chat in chats:
        expected = theirs.apply_chat_template(
            chat,
            chat_template=source,
            tools=TOOLS if with_tools else None,
            add_generation_prompt=prompt,
            tokenize=False,
            enable_thinking=False,
        )
        got = template(source).render(
            chat,
            tools=TOOLS if with_tools else None,
            add_generation_prompt=prompt,
            chat_template_kwargs={"enable_thinking": False},
        )
        assert got == expected


def test_what_templates_find() -> None:
    clock = template("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert clock.render([USER]) == "26 Jul 2024"
    assert template("{{ dict(a=1) | tojson }}{{ dict([['b', 2]]).b }}").render([USER]) == '{"a": 1}2'
    assert template("{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}").render([USER]) == '{"a": "<é>", "b": 1}'
    assert template("{{ [1, 2] | tojson(separators=(',', ':')) }}").render([USER]) == "[1,2]"
    assert template("{{ bos_token is defined }}|{{ bos_token }}", special_tokens={}).render([USER]) == "False|"
    assert template("{{ tools is none }}{{ documents is none }}").render([USER]) == "TrueTrue"
    assert template("{{ missing.field if missing is defined else 'no' }}").render([USER]) == "no"
    assert template("{% set ns = namespace(self=1, x=2) %}{% set ns.x = 3 %}{{ ns.self + ns.x }}").render([USER]) == "4"
    assert template("a\n{% if true %}\n  b\n{% endif %}\nc\n").render([USER]) == "a\n  b\nc"
    # A variable set inside {% generation %} stays inside.
    assert (
        template("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}").render([USER])
        == "21"
    )


# -- messages


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template("{{ messages[0].content }}").render([{"role": "user", "content": parts}]) == "a\nb"


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "Bern"}}}
# What the chat templates of DeepSeek's distilled models ask, and Llama 3.1's.
ASKS_NONE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for c in m['tool_calls'] %}<call>{{ c['function']['name'] }}{{ c['function']['arguments'] | tojson }}{% endfor %}"
    "{% elif m['content'] is not none %}[{{ m['content'] + '' }}]{% endif %}{% endfor %}"
)
ASKS_PRESENT = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one') }}"
    "{% endif %}<call>{{ m.tool_calls[0].function | tojson }}{% else %}[{{ m['content'] | trim }}]{% endif %}{% endfor %}"
)
ADDS = (
    "{% for m in messages %}[{{ '' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}]{% endfor %}"
)


@pytest.mark.parametrize("content", [{}, {"content": None}], ids=["absent", "null"])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (ASKS_NONE, '<call>look{"at": "Bern"}'),
        (ASKS_PRESENT, '<call>{"name": "look", "arguments": {"at": "Bern"}}'),
        (ADDS, '[{"name": "look", "arguments": {"at": "Bern"}}]'),
    ],
)
def test_a_call_without_content_stands_in_the_prompt(source: str, expected: str, content: dict[str, Any]) -> None:
    assert template(source).render([{"role": "assistant", **content, "tool_calls": [CALL]}]) == expected


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Let me look.", "tool_calls": [CALL]},
        {"content": None, "tool_calls": [CALL]},
        {"content": "Let me look.", "function_call": {"name": "look", "arguments": "{}"}},
    ],
)
def test_a_call_that_would_be_lost_is_refused(message: dict[str, Any]) -> None:
    for source in (SMOLLM2, "{{ messages[1].content }} look"):
        with pytest.raises(RequestError) as caught:
            template(source).render([USER, {"role": "assistant", **message}])
        assert "writes no such call into the prompt" in str(caught.value) or message["content"] is None
        assert "\n" not in str(caught.value)


def test_null_is_absent() -> None:
    """A message as the clients' ``model_dump()`` writes it is the one written by hand."""
    dumped = {"role": "assistant", "content": "a", "tool_calls": None, "function_call": None, "refusal": None}
    assert template(ASKS_PRESENT).render([USER, dumped]) == f"[{USER['content']}][a]"
    assert template(ASKS_PRESENT).render([USER, {**dumped, "tool_calls": []}]) == f"[{USER['content']}][a]"
    assert template("{{ messages[0] | tojson }}").render([dumped]) == '{"role": "assistant", "content": "a"}'


def test_message_objects_are_what_they_dump() -> None:
    """OpenAI's client returns pydantic models, others return dataclasses; both are kept in histories as they come."""

    @dataclass
    class Function:
        name: str
        arguments: str

    class Message:
        def model_dump(self) -> dict[str, Any]:
            call = {"type": "function", "function": Function("look", "{}")}
            return {"role": "assistant", "content": None, "tool_calls": [call], "audio": None}

    messages: list[Any] = [USER, Message()]
    expected = f"[{USER['content']}]" + '<call>{"name": "look", "arguments": "{}"}'
    assert template(ASKS_PRESENT).render(messages) == expected


READS_PARTS = [
    "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}<{{ p.text }}>{% endfor %}{% endfor %}",
    "{% macro show(c) %}{% for p in c %}<{{ p.text }}>{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.get('content')) }}{% endfor %}",
]


@pytest.mark.parametrize("source", READS_PARTS)
def test_a_template_that_reads_parts_gets_parts(source: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"text": "b"}]
    assert template(source).render([{"role": "user", "content": parts}]) == "<a><b>"


def test_tools_documents_and_arguments_reach_the_template() -> None:
    source = "{{ tools | tojson }}{{ documents[0].title }}{{ enable_thinking }}{{ pad_token }}"
    made = ChatTemplate(source, special_tokens={"pad_token": "<pad>"}, tool_use="tools: {{ tools[0].name }}")
    told: dict[str, Any] = {"documents": [{"title": "T"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert made.render([USER], **told) == "nullTFalse<pad>"
    assert made.render([USER], tools=[{"name": "f"}], **told) == "tools: f"
    for bad in ({"documents": "d"}, {"documents": ["d"]}, {"chat_template_kwargs": [1]}, {"tools": {"a": 1}}):
        with pytest.raises(RequestError, match=f"{next(iter(bad))}: got "):
            made.render([USER], **bad)
    with pytest.raises(RequestError, match='chat_template_kwargs: got "pad_token", which has its own'):
        made.render([USER], chat_template_kwargs={"pad_token": "x"})


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: got text, expected a list"),
        ([], "messages: got 0 messages, expected 1 to 4096"),
        ([USER] * 4097, "messages: got 4097 messages"),
        (["hi"], "messages[0]: got text, expected an object with role and content"),
        ([USER, {"content": "x"}], "messages[1].role: got null"),
        ([{"role": "", "content": "x"}], 'messages[0].role: got ""'),
        ([{"role": 5, "content": "x"}], "messages[0].role: got 5"),
        ([{"role": "u" * 65, "content": "x"}], 'messages[0].role: got "uuu'),
        ([{"role": "user"}], "messages[0].content: got null, expected text"),
        ([{"role": "user", "content": 5}], "messages[0].content: got 5"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            'messages[0].content[0]: got {"type": "image_url", "image_url": {}}, expected {"type": "text"',
        ),
        ([{"role": "user", "content": "x", "data": b"x"}], "messages: got a value of type bytes"),
        ([{"role": "user", "content": "x", "data": object()}], "messages: got a value of type object"),
        ([{"role": "user", "content": "x", 5: 1}], "messages: got an object with a key of type int"),
        ([{"role": "user", "content": "x", "data": deep(100)}], "messages: got values nested more than 64 deep"),
    ],
)
def test_bad_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        template(SMOLLM2).render(messages)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(RequestError, match="tools: got text"):
        template(SMOLLM2).render([USER], tools=["f"])  # type: ignore[list-item]
    with pytest.raises(RequestError, match='chat_template_kwargs: got "messages"'):
        template(SMOLLM2).render([USER], chat_template_kwargs={"messages": []})
    with pytest.raises(RequestError, match="messages: got more than 16777216 characters"):
        template(SMOLLM2).render([{"role": "user", "content": "x" * (9 << 20)}] * 2)


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": "a", "list": [1]}]
    before = json.dumps(messages)
    changing = "{% for m in messages %}{{ m.__setitem__('role', 'x') }}{% endfor %}"
    with pytest.raises(RequestError):
        template(changing).render(messages)
    assert json.dumps(messages) == before


# -- from a directory


def write(path: Path, name: str, content: Any) -> None:
    (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_from_directory(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path) is None
    config: dict[str, Any] = {"bos_token": {"content": "<B>"}, "eos_token": "<E>"}
    write(tmp_path, "tokenizer_config.json", config)
    assert ChatTemplate.from_directory(tmp_path) is None
    write(tmp_path, "tokenizer_config.json", {**config, "chat_template": "1{{ bos_token }}{{ eos_token }}"})
    assert rendered(tmp_path) == "1<B><E>"
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "2{{ bos_token }}"}]
    write(tmp_path, "tokenizer_config.json", {**config, "chat_template": several})
    assert rendered(tmp_path) == "2<B>"
    write(tmp_path, "chat_template.jinja", "3{{ eos_token }}")
    assert rendered(tmp_path) == "3<E>"


def rendered(path: Path) -> str:
    loaded = ChatTemplate.from_directory(path)
    assert loaded is not None
    return loaded.render([USER])


def test_from_a_broken_directory(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": 5})
    with pytest.raises(BundleError, match=r"tokenizer_config\.json: chat_template: got 5"):
        ChatTemplate.from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BundleError, match=r"chat_template\.jinja: cannot be read"):
        ChatTemplate.from_directory(tmp_path)
