"""Random conversations over six kinds of models: prompt and ids are those of AutoTokenizer and ``apply_chat_template``.

The templates are written for this test, with the constructions of those that are published for each kind.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from dmtd_models.checkpoints.hf import HuggingFaceCheckpoint
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.errors import RequestError
from dmtd_runtime.text.chat_template import ChatTemplate
from dmtd_runtime.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

QUICK, LONG = 30, 4000

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system + '\\n' if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|im_start|>system\\n\\nToday Date: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n" }}{% endfor %}
{%- endif %}
{{- system_message }}{{- "<|im_end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time!") }}{% endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|im_start|>assistant\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|im_end|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|im_start|>ipython\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{% endif %}
        {{- "<|im_end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{% endif %}"""
QWEN2 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{% else %}{{- 'You are helpful.' }}{% endif %}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{% endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
            or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{% endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = """\
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{% set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{% endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
                {{- '<tool_call>{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{% endif %}
                {{- '}</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{bos_token}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<|User|>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}"
    "{%- for tool in message['tool_calls'] %}"
    "{{'<|Call|>' + tool['function']['name'] + '\n' + (tool['function']['arguments'] | tojson) + eos_token}}{%- endfor %}"
    "{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{'<|Assistant|>' + content + eos_token}}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{{'<|Output|>' + message['content'] + pad_token}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<|Assistant|><think>\n'}}{% endif %}"
)
PARTS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}{{- message['content'] }}
    {%- else %}{% for part in message['content'] %}{{- '<part>' + part['text'] }}{% endfor %}{% endif %}
    {%- for call in message.tool_calls or [] %}{{- call | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- for document in documents or [] %}{{- document.title + unk_token }}{% endfor %}"""

# Kind -> (family, template, tokenizer_class, whether the tokenizer is of Llama 2's kind).
KINDS: dict[str, tuple[str, str, str, bool]] = {
    "smollm": ("llama", CHATML, "PreTrainedTokenizerFast", False),
    "llama2": ("llama", LLAMA2, "LlamaTokenizer", True),
    "llama3": ("llama", LLAMA3, "PreTrainedTokenizerFast", False),
    "qwen2": ("qwen2", QWEN2, "Qwen2Tokenizer", False),
    "qwen3": ("qwen3", QWEN3, "Qwen2Tokenizer", False),
    "deepseek": ("qwen3", DEEPSEEK, "LlamaTokenizerFast", False),
    "parts": ("llama", PARTS, "PreTrainedTokenizerFast", False),
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")
ADDED = {"<think>": 0, "</think>": 1, "<|User|>": 2}  # behind the others
PIECES = (
    *(
        "hi",
        " ",
        "\n",
        "  \n",
        "Zürich",
        "e\u0301",
        "狐",
        "👨‍👩‍👧",
        "2024",
        "don't",
        "{{ x }}",
        "{% if %}",
        '"',
        "\\",
        "<b>&amp;",
    ),
    *(
        "<think>",
        "</think>",
        "<|im_end|>",
        "<|im_start|>user\n",
        "<s>",
        "</s>",
        "<|User|>",
        "[INST]",
        "<unk>",
        "\ufffd",
        "\u200d",
    ),
)
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "é": [1, 2.5, None, True]}}}
]


@dataclass(frozen=True)
class Model:
    """A directory as transformers reads it, and what a bundle of it has."""

    theirs: Any
    template: ChatTemplate
    tokenizer: Tokenizer
    reads_parts: bool


def write_model(directory: Path, kind: str) -> Path:
    """Tokens in tokenizer.json, added_tokens.json and special_tokens_map.json, as older directories have them."""
    family, template, tokenizer_class, is_metaspace = KINDS[kind]
    write_tiny_checkpoint(directory, family=family, layers=2, tokenizer=True, vocab_size=300)
    if is_metaspace:
        words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h"]
        core = Core(models.BPE({word: i for i, word in enumerate(words)}, [("▁", "h")], byte_fallback=True))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        core.add_special_tokens(["<unk>"])
    else:
        words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "hi", "Ġ\u0120"]
        core = Core(models.BPE({word: i for i, word in enumerate(words)}, [("h", "i"), ("Ġ", "Ġ")]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    core.save(str(directory / "tokenizer.json"))
    size = core.get_vocab_size()
    files: dict[str, Any] = {
        "tokenizer_config.json": {"tokenizer_class": tokenizer_class, "chat_template": template, "bos_token": "<s>"},
        "special_tokens_map.json": {
            "eos_token": {"content": "</s>"},
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
        "added_tokens.json": {token: size + i for token, i in ADDED.items()},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    place = tmp_path_factory.mktemp(request.param)
    source = write_model(place / "model", request.param)
    (place / "bundle").mkdir()
    for name, content in HuggingFaceCheckpoint(source).assets().items():
        (place / "bundle" / name).write_bytes(content)
    template, tokenizer = ChatTemplate.from_directory(place / "bundle"), Tokenizer.from_directory(place / "bundle")
    assert template is not None
    assert tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    return Model(theirs=theirs, template=template, tokenizer=tokenizer, reads_parts=request.param == "parts")


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(0, 6)))


def random_messages(rng: random.Random) -> list[dict[str, Any]]:
    """A conversation as clients keep it: mostly in order, keys that are null, parts, calls with unlike names."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": random_text(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": random_content(rng)})
        if rng.random() < 0.8:
            messages.append(random_answer(rng, len(messages)))
        if "tool_calls" in messages[-1] and rng.random() < 0.8:
            messages.append({"role": "tool", "content": random_content(rng), "tool_call_id": "1"})
    if rng.random() < 0.1:
        rng.shuffle(messages)
    return messages


def random_content(rng: random.Random) -> Any:
    if rng.random() < 0.8:
        return random_text(rng)
    return [{"type": "text", "text": random_text(rng)} for _ in range(rng.randint(1, 3))]


def random_answer(rng: random.Random, number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": random_content(rng)}
    for name in ("refusal", "audio", "function_call", "tool_calls", "annotations"):
        if rng.random() < 0.3:
            message[name] = None
    if rng.random() < 0.2:
        message[rng.choice(("reasoning_content", "thinking", "reasoning"))] = random_text(rng)
    if rng.random() < 0.3:
        arguments: Any = {"at": random_text(rng), "n": [1, None]}
        calls = [
            {"id": str(i), "type": "function", "function": {"name": f"fn{number}_{i}", "arguments": arguments}}
            for i in range(rng.choice((1, 1, 1, 2)))
        ]
        if rng.random() < 0.3:
            for call in calls:
                call["function"]["arguments"] = json.dumps(arguments)
        message["tool_calls"] = calls
        way = rng.random()
        if way < 0.4:
            message["content"] = None
        elif way < 0.6:
            del message["content"]
    return message


def asked_of_theirs(messages: list[dict[str, Any]], reads_parts: bool) -> list[dict[str, Any]]:
    """Parts are joined for a template that knows none, where transformers would write them as Python does."""
    asked = copy.deepcopy(messages)
    for message in asked:
        if isinstance(message.get("content"), list) and not reads_parts:
            message["content"] = "\n".join(part["text"] for part in message["content"])
    return asked


def names_called(messages: list[dict[str, Any]]) -> list[str]:
    return [call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()]


def check(model: Model, rng: random.Random) -> bool:
    """One random case; whether transformers made a prompt that holds every call."""
    messages = random_messages(rng)
    options: dict[str, Any] = {
        "tools": TOOLS if rng.random() < 0.3 else None,
        "documents": [{"title": "T", "text": "x"}] if rng.random() < 0.1 else None,
        "add_generation_prompt": rng.random() < 0.7,
    }
    kwargs = {"enable_thinking": rng.random() < 0.5} if rng.random() < 0.5 else {}
    asked, called = asked_of_theirs(messages, model.reads_parts), names_called(messages)
    try:
        expected = model.theirs.apply_chat_template(asked, tokenize=False, **options, **kwargs)
    except Exception:
        expected = None
    before = copy.deepcopy(messages)
    try:
        got = model.template.render(messages, **options, chat_template_kwargs=kwargs)
    except RequestError:
        got = None
    assert messages == before
    kept = expected is not None and all(name in expected for name in called)
    if kept:
        assert got == expected, messages
        ids = model.theirs.apply_chat_template(asked, return_dict=False, **options, **kwargs)
        assert model.tokenizer.encode(got, add_special_tokens=False) == ids, messages
        assert model.tokenizer.decode(ids, skip_special_tokens=False) == model.theirs.decode(ids)
    elif called:  # transformers fails, or loses a call: here it stands in the prompt, or the request is refused
        assert got is None or all(name in got for name in called), messages
    else:
        assert got is None, messages
    text = random_text(rng)
    assert model.tokenizer.encode(text) == model.theirs.encode(text), text
    return kept


def test_prompts_and_ids_are_those_of_transformers(model: Model) -> None:
    rng = random.Random(5)
    kept = sum(check(model, rng) for _ in range(QUICK))
    assert kept >= QUICK // 4, "the cases say too little"


@pytest.mark.slow
def test_prompts_and_ids_are_those_of_transformers_in_many_cases(model: Model) -> None:
    rng = random.Random(6)
    assert sum(check(model, rng) for _ in range(LONG)) >= LONG // 4
