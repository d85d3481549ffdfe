"""Chat messages to the prompt text of the model: ``ChatTemplate``, jinja2 in a sandbox.

Flow: messages -> ``ChatTemplate.render`` -> ``Tokenizer.encode(text, add_special_tokens=False)`` -> the model.
Templates are written for transformers: filters, globals, extensions and white-space rules are those they find there.
The sandbox refuses what would reach the interpreter (underscore attributes, changing arguments), and templates see
plain JSON values only. What goes in, what comes out and products are bounded in size; running time, and memory that one
expression can take by other means, are not: take templates from the bundle, never from a request.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from dmtd_runtime.errors import BundleError, DmtdError, RequestError
from dmtd_runtime.text.tokenizer import SpecialTokens, read_config

MAX_TEMPLATE_CHARS = 1 << 20
MAX_MESSAGES = 4096
MAX_MESSAGE_CHARS = 16 << 20
"""Of all strings in messages, tools and extra together."""
MAX_RENDERED_CHARS = 64 << 20
MAX_DEPTH = 64
MAX_ROLE_CHARS = 64

_RESERVED: Final = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


class ChatTemplate:
    """One compiled chat template. Safe to use from several threads."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None,
        eos_token: str | None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compiles a template.

        Args:
            source: The template's text.
            bos_token: What the template sees under this name; None: undefined, which prints as nothing.
            eos_token: The same.
            now: The clock behind ``strftime_now``.

        Raises:
            BundleError: Too long, or not a jinja2 template.
        """
        if len(source) > MAX_TEMPLATE_CHARS:
            raise BundleError(f"chat template: got {len(source)} characters, expected at most {MAX_TEMPLATE_CHARS}")
        self.source = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(
                f"chat template: line {error.lineno}: {_one_line(error)}; correct the template"
            ) from error
        except (RecursionError, jinja2.TemplateError, SyntaxError) as error:
            raise BundleError(
                f"chat template: cannot be compiled ({_one_line(error)}); correct the template"
            ) from error

    @classmethod
    def from_directory(cls, path: str | Path, *, source: str | None = None) -> "ChatTemplate | None":
        """Reads chat_template.jinja, or ``chat_template`` of tokenizer_config.json (of several, the one named default).

        Args:
            path: A bundle, or a Hugging Face model directory.
            source: A template in place of the directory's.

        Returns:
            The template; None where there is none.

        Raises:
            BundleError: A file is broken.
        """
        directory = Path(path)
        source = _read_source(directory) if source is None else source
        if source is None:
            return None
        special = SpecialTokens.from_directory(directory)
        return cls(source, bos_token=special.bos_token, eos_token=special.eos_token)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a conversation.

        Args:
            messages: Each with a ``role`` and a ``content``: a string, or a list of ``{"type": "text", "text": ...}``
                parts, which are joined by line breaks. A message with ``tool_calls`` may lack its content.
            add_generation_prompt: Whether the text ends where the assistant's answer begins.
            tools: JSON schemas of functions that the model may call.
            extra: Further names for the template (``enable_thinking``).

        Returns:
            The prompt.

        Raises:
            RequestError: Messages of another form, too large, or refused by the template.
        """
        budget = _Budget(MAX_MESSAGE_CHARS)
        names = {str(name): budget.plain(value) for name, value in (extra or {}).items()}
        for name in _RESERVED:
            if name in names:
                raise RequestError(
                    f"got {name!r}, which has its own argument or belongs to the model; remove it", param="extra"
                )
        names = {"documents": None, **names, **self._tokens}
        names["messages"] = _checked_messages(messages, budget)
        names["tools"] = None if tools is None else [_checked_tool(tool, budget) for tool in tools]
        names["add_generation_prompt"] = bool(add_generation_prompt)
        pieces: list[str] = []
        room = MAX_RENDERED_CHARS
        try:
            for piece in self._template.generate(names):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise _too_large(MAX_RENDERED_CHARS)
        except DmtdError:
            raise
        except Exception as error:  # a template may fail in any way that an expression can
            raise RequestError(
                f"the chat template cannot render them: {_one_line(error)}; "
                "check their roles, their order and their fields",
                param="messages",
            ) from error
        return "".join(pieces)


class _Budget:
    """Copies values into plain JSON types and counts their characters.

    Templates so get fresh values whose methods the sandbox knows, and cannot change the caller's.
    """

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._left = max_chars

    def plain(self, value: object, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise RequestError(f"got values nested more than {MAX_DEPTH} deep, expected fewer levels", param="messages")
        self._spend(1)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            self._spend(len(value))
            return str.__str__(value)
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
            return [self.plain(item, depth + 1) for item in value]
        raise RequestError(
            f"got a value of type {type(value).__name__}, expected JSON values "
            "(text, numbers, true / false, null, lists, objects)",
            param="messages",
        )

    def _key(self, key: object) -> str:
        if not isinstance(key, str):
            raise RequestError(
                f"got an object with a key of type {type(key).__name__}, expected text keys", param="messages"
            )
        self._spend(len(key))
        return str.__str__(key)

    def _spend(self, chars: int) -> None:
        self._left -= chars
        if self._left < 0:
            raise RequestError(
                f"got more than {self._max_chars} characters, expected fewer; shorten them", param="messages"
            )


def _checked_messages(messages: object, budget: _Budget) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError(
            f"got {type(messages).__name__}, expected a list of {{role, content}} objects", param="messages"
        )
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"got {len(messages)} messages, expected 1 to {MAX_MESSAGES}", param="messages")
    return [_checked_message(index, message, budget) for index, message in enumerate(messages)]


def _checked_message(index: int, message: object, budget: _Budget) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"got {type(message).__name__}, expected an object with role and content", param=where)
    plain: dict[str, Any] = budget.plain(message)
    role = plain.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= MAX_ROLE_CHARS:
        raise RequestError(
            f"got {_short(role)}, expected text such as 'system', 'user' or 'assistant'", param=f"{where}.role"
        )
    content = plain.get("content")
    if content is None and plain.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part_text(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"got {_short(content)}, expected text or a list of text parts", param=f"{where}.content")
    return {**plain, "content": content}


def _part_text(where: str, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise RequestError(
            f"got {_short(part)}, expected {{'type': 'text', 'text': ...}}: this model reads text", param=where
        )
    return text


def _checked_tool(tool: object, budget: _Budget) -> object:
    if not isinstance(tool, Mapping):
        raise RequestError(f"got {type(tool).__name__}, expected JSON schemas of functions", param="tools")
    return budget.plain(tool)


def _read_source(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            if file.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
                raise BundleError(f"{file}: got {file.stat().st_size} bytes, expected at most {4 * MAX_TEMPLATE_CHARS}")
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{file}: cannot be read ({error}); export the model again") from error
    file = directory / "tokenizer_config.json"
    value = read_config(file).get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise BundleError(f"{file}: chat_template: got {_short(value)}, expected text; correct the file")
    return value


# -- the environment that templates are written for


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with products of texts and lists bounded (``"a" * 10**12`` is one expression)."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | list | tuple) and isinstance(times, int):
                _refuse_size(len(value) * times)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _refuse_size(left.bit_length() * max(right, 0))
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` whose names cannot begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in dict(*args[1:], **values):
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _environment(now: Callable[[], datetime]) -> jinja2.Environment:
    def strftime_now(format: str) -> str:
        return now().strftime(format)

    def make_dict(*pairs: Any, **values: Any) -> dict[str, Any]:
        return dict(*pairs, **values)

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["namespace"] = _Namespace
    # A function in place of the type: `dict.update(messages[0], ...)` would pass by the sandbox's look at its argument.
    environment.globals["dict"] = make_dict
    del environment.globals["lipsum"]
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace name {name!r} begins with an underscore")


def _refuse_size(size: int) -> None:
    if size > MAX_RENDERED_CHARS:
        raise _too_large(MAX_RENDERED_CHARS)


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"the chat template's text grows beyond {limit} characters; shorten the messages", param="messages"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
