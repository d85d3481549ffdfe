"""Chat messages to the prompt text of the model: ``ChatTemplate``, jinja2 in a sandbox.

Flow: messages (checked in ``messages``) -> ``ChatTemplate.render`` -> ``Tokenizer.encode(text, add_special_tokens=False)``
-> the model.
Templates are written for transformers: filters, globals, extensions and white-space rules are those they find there.
The sandbox refuses what would reach the interpreter (underscore attributes, changing arguments), and templates see
plain JSON values only. What goes in, what comes out and products are bounded in size; running time, and memory that one
expression can take by other means, are not: take templates from the bundle, never from a request.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from dmtd_errors.words import kind_of, reason, shown
from dmtd_runtime.bundle import contract
from dmtd_runtime.errors import BundleError, DmtdError, RequestError
from dmtd_runtime.text.messages import Budget, Message, calls_of, checked_messages, checked_objects
from dmtd_runtime.text.special_tokens import read_config, read_special_tokens

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 64 << 20
_OWN_ARGUMENTS: Final = ("messages", "tools", "documents", "add_generation_prompt")
_MARK = "dmtdcall{}x"
"""In the place of a function's name: whether the template writes the call."""


class ChatTemplate:
    """A compiled chat template, or two: some models have one of their own for tools. Safe to use from several threads."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        tool_use: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compiles a template.

        Args:
            source: The template's text.
            special_tokens: What the template sees under these names (``bos_token``); others are undefined, which prints as
                nothing.
            tool_use: The text of the template that is taken where tools are given; None: ``source``.
            now: The clock behind ``strftime_now``.

        Raises:
            BundleError: Too long, or not a jinja2 template.
        """
        self.source, self.tool_use_source = source, source if tool_use is None else tool_use
        self._tokens = dict(special_tokens)
        self._default = _Compiled(source, now)
        self._tool_use = self._default if tool_use is None else _Compiled(tool_use, now)

    @classmethod
    def from_directory(cls, path: str | Path, *, given: str | None = None) -> "ChatTemplate | None":
        """Reads chat_template.jinja, or ``chat_template`` of tokenizer_config.json (of several, the one named default).

        Args:
            path: A bundle, or a Hugging Face model directory.
            given: A template in place of the directory's.

        Returns:
            The template; None where there is none.

        Raises:
            BundleError: A file is broken.
        """
        directory = Path(path)
        source = _read_source(directory) if given is None else given
        if source is None:
            return None
        tool_use = _read_template(directory / contract.TOOL_USE_TEMPLATE_FILE) if given is None else None
        return cls(source, special_tokens=read_special_tokens(directory), tool_use=tool_use)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a conversation.

        Args:
            messages: Each with a ``role`` and a ``content``: a string, or a list of ``{"type": "text", "text": ...}`` parts.
                A message with ``tool_calls`` may lack its content; its calls stand in the prompt, or it is refused.
            add_generation_prompt: Whether the text ends where the assistant's answer begins.
            tools: JSON schemas of functions that the model may call.
            documents: Texts to answer from, each with a ``title`` and a ``text``.
            chat_template_kwargs: Further names for the template (``enable_thinking``).

        Returns:
            The prompt.

        Raises:
            RequestError: Messages of another form, too large, or refused by the template.
        """
        budget = Budget()
        template = self._default if tools is None else self._tool_use
        names: dict[str, Any] = {
            **self._checked_kwargs(chat_template_kwargs, budget),
            **self._tokens,
            "tools": checked_objects(tools, "tools", "JSON schemas of functions", budget),
            "documents": checked_objects(documents, "documents", "objects with a title and a text", budget),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        checked = checked_messages(messages, budget, keeps_parts=template.reads_parts)
        if not any(True for message in checked for _ in calls_of(message)):
            return template.render(names, checked)
        return _with_calls(template, names, checked)

    def _checked_kwargs(self, given: Mapping[str, Any] | None, budget: Budget) -> dict[str, Any]:
        values = budget.plain(given or {}, "chat_template_kwargs")
        if not isinstance(values, dict):
            raise RequestError(
                f"got {kind_of(given)}, expected an object of names and values", param="chat_template_kwargs"
            )
        for name in (*_OWN_ARGUMENTS, *self._tokens):
            if name in values:
                raise RequestError(
                    f"got {shown(name)}, which has its own argument or belongs to the model; remove it",
                    param="chat_template_kwargs",
                )
        return values


def _with_calls(template: "_Compiled", names: Mapping[str, Any], messages: Sequence[Message]) -> str:
    """The prompt of a conversation with function calls, all of which stand in it.

    A message that calls and says nothing has no content, as transformers 5 has it. Where the template then fails, or writes
    a call nowhere, it may ask for ``content is none`` or add to a text.
    """
    refused: RequestError | None = None
    silent = any("content" not in message for message in messages)
    for empty in ({}, {"content": None}, {"content": ""}) if silent else ({},):
        shaped = [message if "content" in message else {**message, **empty} for message in messages]
        try:
            text = template.render(names, shaped)
            if _writes_calls(template, names, shaped):
                return text
        except RequestError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    where = next(i for i, message in enumerate(messages) if any(True for _ in calls_of(message)))
    raise RequestError(
        "this model's chat template writes no such call into the prompt, so it would be lost; say in the content what was "
        "called, or use a model that calls functions",
        param=f"messages[{where}].tool_calls",
    )


def _writes_calls(template: "_Compiled", names: Mapping[str, Any], messages: Sequence[Message]) -> bool:
    """Whether every call stands in the prompt: tried with names that occur nowhere else."""
    marked: list[Message] = json.loads(json.dumps(messages))
    calls = [call for message in marked for call in calls_of(message)]
    for index, call in enumerate(calls):
        call["name"] = _MARK.format(index)
    text = template.render(names, marked)
    return all(call["name"] in text for call in calls)


class _Compiled:
    """One template of a model, compiled."""

    def __init__(self, source: str, now: Callable[[], datetime]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise BundleError(f"chat template: got {len(source)} characters, expected at most {MAX_TEMPLATE_CHARS}")
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
            self.reads_parts = _reads_parts(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(
                f"chat template: line {error.lineno}: {_one_line(error)}; correct the template"
            ) from error
        except (RecursionError, jinja2.TemplateError, SyntaxError) as error:
            raise BundleError(
                f"chat template: cannot be compiled ({_one_line(error)}); correct the template"
            ) from error

    def render(self, names: Mapping[str, Any], messages: Sequence[Message]) -> str:
        """The text, bounded in size."""
        pieces: list[str] = []
        room = MAX_RENDERED_CHARS
        try:
            for piece in self._template.generate({**names, "messages": list(messages)}):
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


def _reads_parts(tree: jinja2.nodes.Template) -> bool:
    """Whether the template loops over a message's content, itself or under another name."""
    names: set[str] = set()

    def is_content(node: jinja2.nodes.Node) -> bool:
        if isinstance(node, jinja2.nodes.Name):
            return node.name in names
        if isinstance(node, jinja2.nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, jinja2.nodes.Call) and getattr(node.node, "attr", "") == "get":  # message.get("content")
            return bool(node.args) and getattr(node.args[0], "value", None) == "content"
        return isinstance(node, jinja2.nodes.Getitem) and getattr(node.arg, "value", None) == "content"

    macros = {macro.name: macro for macro in tree.find_all(jinja2.nodes.Macro)}
    for _ in range(3):  # a name of a name, and an argument made of it
        for assign in tree.find_all(jinja2.nodes.Assign):
            if isinstance(assign.target, jinja2.nodes.Name) and is_content(assign.node):
                names.add(assign.target.name)
        for call in tree.find_all(jinja2.nodes.Call):
            macro = macros.get(getattr(call.node, "name", ""))
            if macro is not None:
                names.update(to.name for to, given in zip(macro.args, call.args, strict=False) if is_content(given))
    return any(is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))


def _read_source(directory: Path) -> str | None:
    source = _read_template(directory / "chat_template.jinja")
    if source is not None:
        return source
    file = directory / "tokenizer_config.json"
    value = read_config(file).get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise BundleError(f"{file}: chat_template: got {shown(value)}, expected text; correct the file")
    return value


def _read_template(file: Path) -> str | None:
    if not file.exists():
        return None
    try:
        if file.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
            raise BundleError(f"{file}: got {file.stat().st_size} bytes, expected at most {4 * MAX_TEMPLATE_CHARS}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: cannot be read ({reason(error)}); export the model again") from error


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
