"""What a model's text says: thoughts, content and calls, as chats and responses tell it apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dmtd_runtime.errors import RequestError
from dmtd_runtime.server.errors import invalid
from dmtd_runtime.server.forms import Form, check_size
from dmtd_runtime.server.schema import NamedTool, ToolBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.text.reasoning import ReasoningStream, starts_in_reasoning
from dmtd_runtime.text.tool_calls import (
    ToolCallDelta,
    ToolCallStream,
    ToolFormat,
    forced_calls,
    tool_format_of,
)

_LAST_TOKENS = 16
"""Of a prompt, in which a template may have begun the thoughts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a request says of functions. ``format`` is None where no call is looked for."""

    rendered: list[dict[str, Any]] = field(default_factory=list)
    names: tuple[str, ...] = ()
    format: ToolFormat | None = None
    form: Form | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A piece of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


def tools_of(served: Served, tools: list[ToolBody] | None, choice: str | NamedTool | None, *, parallel: bool) -> Tools:
    """The functions of a request, and the form that its choice forces.

    Raises:
        ApiError: 400; the template or the choice does not go with them.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools")
        return Tools()
    if len(tools) > served.limits.max_tools:
        raise invalid("tools", f"got {len(tools)}, expected at most {served.limits.max_tools}")
    functions = {each.function.name: each.function.parameters for each in tools}
    if len(functions) != len(tools):
        raise invalid("tools", "got two functions of one name")
    rendered = [each.model_dump(exclude_none=True) for each in tools]
    check_size("tools", rendered, served.limits)
    source = "" if served.template is None else served.template.tool_use_source
    if "tools" not in source:
        if choice == "none":  # the prompt is the same with them and without
            return Tools()
        raise invalid("tools", "this model's chat template knows no tools; leave them out")
    if choice == "none":
        return Tools(rendered=rendered)
    format = _format(served, source)
    forced = dict(functions) if choice == "required" else None
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in functions:
            raise invalid("tool_choice", f"got the function {name!r}, expected one of tools")
        forced = {name: functions[name]}
    form = None
    if forced is not None:
        form = _forced(format, forced, parallel=parallel and choice == "required")
    return Tools(rendered=rendered, names=tuple(functions), format=format, form=form, parallel=parallel)


def _forced(format: ToolFormat, functions: dict[str, Any], *, parallel: bool) -> Form:
    """The form of an answer that calls one of these."""
    try:
        return "tools", forced_calls(format, functions, parallel=parallel)
    except RequestError as error:
        raise invalid("tools", error.problem) from None


def _format(served: Served, source: str) -> ToolFormat:
    given = served.options.tool_call_parser
    found = tool_format_of(source) if given is None else given
    if found is None:
        raise invalid("tools", "how this model writes calls is not known; start the server with --tool-call-parser")
    return found  # type: ignore[return-value]


class Listener:
    """Takes the text of one choice piece by piece; a call too many is dropped where calls may not be parallel."""

    def __init__(self, served: Served, tools: Tools, prompt: list[int], *, has_form: bool) -> None:
        self._parallel = tools.parallel
        self._reasoning: ReasoningStream | None = None
        if served.options.reasoning_parser is not None and not has_form:
            end = served.tokenizer.decode(prompt[-_LAST_TOKENS:], skip_special_tokens=False)
            self._reasoning = ReasoningStream(started=starts_in_reasoning(end))
        self._calls = ToolCallStream(tools.format, names=tools.names) if tools.format else None

    @property
    def has_called(self) -> bool:
        """Whether the answer calls a function."""
        return self._calls is not None and self._calls.num_calls > 0

    def push(self, text: str, *, last: bool) -> Said:
        """The next piece; ``last``: nothing follows."""
        parts = [self._hear(text)]
        if last:
            parts += self._flush()
        return Said(
            reasoning="".join(part.reasoning for part in parts),
            content="".join(part.content for part in parts),
            calls=tuple(call for part in parts for call in part.calls),
        )

    def _hear(self, text: str) -> Said:
        reasoning = ""
        if self._reasoning is not None:
            heard = self._reasoning.push(text)
            reasoning, text = heard.reasoning, heard.content
        return self._called(reasoning, text)

    def _called(self, reasoning: str, text: str) -> Said:
        if self._calls is None:
            return Said(reasoning=reasoning, content=text)
        heard = self._calls.push(text)
        return Said(reasoning=reasoning, content=heard.content, calls=self._allowed(heard.calls))

    def _flush(self) -> list[Said]:
        parts = []
        if self._reasoning is not None:
            heard = self._reasoning.flush()
            parts.append(self._called(heard.reasoning, heard.content))
        if self._calls is not None:
            end = self._calls.flush()
            parts.append(Said(content=end.content, calls=self._allowed(end.calls)))
        return parts

    def _allowed(self, calls: tuple[ToolCallDelta, ...]) -> tuple[ToolCallDelta, ...]:
        return calls if self._parallel else tuple(call for call in calls if call.index == 0)
