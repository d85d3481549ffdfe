"""Tool calls in the text of a model: which format its template writes, calls out of text, and the form that forces them.

Flow: text, whole or in pieces -> ``ToolCallStream`` -> content and pieces of calls; ``tool_choice`` -> ``forced_calls`` ->
``SamplingParams.structured_outputs``. Two formats:

- ``hermes`` (Hermes, Qwen 2.5 and 3): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere and several times.
- ``llama3_json`` (Llama 3): the whole answer is ``{"name": ..., "parameters": {...}}``, after ``<|python_tag|>`` or not; several
  stand behind each other, with a semicolon or without.

What only looks like a call stays content, to the letter; white space around calls is dropped. How text is cut into pieces changes
nothing. Nothing here knows a message, a model or HTTP.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dmtd_runtime.sampling.stops import StopStringMatcher
from dmtd_runtime.sampling.structured import JSON_OPTIONS, StructuredOutputs
from dmtd_runtime.text.call_scanner import CallScanner

ToolFormat = Literal["hermes", "llama3_json"]

_BEGIN, _END, _PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
_BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call; ``arguments`` is JSON text as the model wrote it, which need not be complete."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A piece of the call ``index``: its id and name once, at first; all ``arguments`` together are its JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDelta:
    """What a piece of text led to: content, then pieces of calls."""

    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


def tool_format_of(template: str) -> ToolFormat | None:
    """The format that a chat template writes calls in, by its text; None where it is neither, or knows no tools."""
    if _BEGIN in template and "<function=" not in template:
        return "hermes"
    if '"parameters"' in template and ("ipython" in template or _PYTHON_TAG in template):
        return "llama3_json"
    return None


def parse_tool_calls(
    text: str, format: ToolFormat, *, names: Collection[str] | None = None, new_id: Callable[[], str] | None = None
) -> tuple[str, list[ToolCall]]:
    """Content and calls of a whole text; arguments as for ``ToolCallStream``."""
    stream = ToolCallStream(format, names=names, new_id=new_id)
    parts = (stream.push(text), stream.flush())
    return "".join(part.content for part in parts), whole_calls(piece for part in parts for piece in part.calls)


def whole_calls(pieces: Iterable[ToolCallDelta]) -> list[ToolCall]:
    """Calls of all their pieces."""
    told: dict[int, ToolCall] = {}
    for piece in pieces:
        before = told.get(piece.index) or ToolCall(id=piece.id or "", name=piece.name or "", arguments="")
        told[piece.index] = ToolCall(id=before.id, name=before.name, arguments=before.arguments + piece.arguments)
    return [told[index] for index in sorted(told)]


class ToolCallStream:
    """Takes the text of one answer piece by piece."""

    def __init__(
        self, format: ToolFormat, *, names: Collection[str] | None = None, new_id: Callable[[], str] | None = None
    ) -> None:
        """Starts an answer.

        Args:
            format: How calls are written.
            names: The functions there are. JSON that names another one is content (``llama3_json``, which has no marks).
            new_id: Makes the id of a call.
        """
        self._marked = format == "hermes"
        self._names = names if not self._marked else None
        self._new_id = new_id or (lambda: f"call_{secrets.token_hex(12)}")
        self._state: Callable[[str], None] = self._in_text if self._marked else self._between
        self._marks = StopStringMatcher((_BEGIN, _END) if self._marked else ())
        self._num_calls = 0
        self._told = _Told()
        self._blank = ""  # white space that is content if more content follows
        self._after_call = False  # and no content since
        self._raw = ""  # of what may be a call
        self._scanner = CallScanner()
        self._index: int | None = None  # of the call under way, once it is told

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return self._num_calls

    def push(self, text: str) -> ToolDelta:
        """Takes a piece."""
        for char in text:
            self._state(char)
        return self._told.take()

    def flush(self) -> ToolDelta:
        """Ends the answer. A call that was cut short stays as far as it was told; one that was not is content."""
        self._content(self._marks.release())
        if self._index is None:
            self._content(self._raw)
        if not self._after_call:
            self._told.content += self._blank
        self._raw = self._blank = ""
        return self._told.take()

    def _content(self, text: str) -> None:
        text = self._blank + text
        kept = text.rstrip(_BLANK)
        self._blank = text[len(kept) :]
        if kept and self._after_call:
            kept, self._after_call = kept.lstrip(_BLANK), False
        self._told.content += kept

    def _in_text(self, char: str) -> None:
        """Content, until the mark of a call."""
        text, mark = self._marks.push(char)
        self._content(text)
        if mark == _BEGIN:
            self._begin(self._blank + _BEGIN)
        elif mark == _END and not self._after_call:
            self._content(_END)

    def _between(self, char: str) -> None:
        """Before, between and behind calls without marks, where anything else makes all the rest content."""
        self._raw += char
        rest = self._raw.lstrip(_BLANK + ";" if self._num_calls else _BLANK)
        rest = rest.removeprefix(_PYTHON_TAG).lstrip(_BLANK)
        if rest == "{":
            self._begin(self._raw[:-1])
            self._in_call(char)
        elif not _PYTHON_TAG.startswith(rest):
            self._give_up()

    def _begin(self, raw: str) -> None:
        self._scanner, self._raw, self._blank, self._index = CallScanner(), raw, "", None
        self._state = self._in_call

    def _in_call(self, char: str) -> None:
        scanner = self._scanner
        scanner.push(char)
        self._raw += char
        if scanner.done and self._marked:
            scanner.without_arguments()
        if self._index is None and scanner.ready and (self._names is None or scanner.name in self._names):
            self._index, self._num_calls, self._after_call = self._num_calls, self._num_calls + 1, True
            self._told.calls.append(ToolCallDelta(index=self._index, id=self._new_id(), name=scanner.name))
        if self._index is not None:
            self._told.add_arguments(self._index, scanner.take())
        if scanner.done or scanner.bad:
            if self._index is None:
                self._give_up()
                return
            self._raw, self._index = "", None
            self._state = self._in_text if self._marked else self._between
            if scanner.bad:
                self._state(char)

    def _give_up(self) -> None:
        """What looked like a call is content."""
        raw, self._raw = self._raw, ""
        self._state = self._in_text if self._marked else self._content
        self._content(raw)


@dataclass(slots=True)
class _Told:
    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)

    def add_arguments(self, index: int, text: str) -> None:
        if not text:
            return
        if self.calls and self.calls[-1].index == index:
            self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + text)
        else:
            self.calls.append(ToolCallDelta(index=index, arguments=text))

    def take(self) -> ToolDelta:
        delta = ToolDelta(content=self.content, calls=tuple(self.calls))
        self.content, self.calls = "", []
        return delta


def forced_calls(
    format: ToolFormat, functions: Mapping[str, Mapping[str, Any] | None], *, parallel: bool = False
) -> StructuredOutputs:
    """The form of an answer that is a call: ``tool_choice`` required, or a named function if it is the only one.

    Args:
        format: How calls are written.
        functions: Name -> JSON schema of its arguments; None: it takes none.
        parallel: Whether several calls may follow each other (``llama3_json`` has one).

    Raises:
        RequestError: No function, or a schema beyond the bounds; ``param`` is ``structured_outputs``.
    """
    key, (before, after) = (
        ("arguments", ("<tool_call>\n", "\n</tool_call>")) if format == "hermes" else ("parameters", ("", ""))
    )
    again = ' ("\\n" call)*' if parallel and format == "hermes" else ""
    lines = [f"start: call{again}", "call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
    for index, (name, schema) in enumerate(functions.items()):
        given = {"type": "object", "properties": {}, "additionalProperties": False} if schema is None else schema
        head = f'{before}{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
        lines.append(f"call{index}: {json.dumps(head)} arguments{index} {json.dumps('}' + after)}")
        # What a schema says of its own writing ("x-guidance") gives way to ours.
        lines.append(f"arguments{index}: %json {json.dumps({**given, 'x-guidance': JSON_OPTIONS})}")
    return StructuredOutputs(grammar="\n".join(lines) if functions else "")
