"""What a model thinks before it answers: ``<think>...</think>`` at the beginning of its text, apart from the answer.

Flow: text, whole or in pieces -> ``ReasoningStream`` -> reasoning and content -> ``ToolCallStream``. White space around both is
dropped. How text is cut into pieces changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dmtd_runtime.sampling.stops import StopStringMatcher

_BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningDelta:
    """What a piece of text led to."""

    reasoning: str = ""
    content: str = ""


def starts_in_reasoning(prompt: str, *, begin: str = "<think>") -> bool:
    """Whether the template has already written the mark, at the end of the prompt."""
    return prompt.rstrip(_BLANK).endswith(begin)


def split_reasoning(text: str, *, started: bool = False) -> ReasoningDelta:
    """Reasoning and content of a whole text."""
    stream = ReasoningStream(started=started)
    first, last = stream.push(text), stream.flush()
    return ReasoningDelta(reasoning=first.reasoning + last.reasoning, content=first.content + last.content)


class ReasoningStream:
    """Takes the text of one answer piece by piece. Text without the mark at its beginning is content."""

    def __init__(self, *, started: bool = False, begin: str = "<think>", end: str = "</think>") -> None:
        """Starts an answer; ``started``: it is in the middle of the reasoning (:func:`starts_in_reasoning`)."""
        self._begin = begin
        self._ends = StopStringMatcher((end,))
        self._state: Callable[[str], None] = self._in_reasoning if started else self._at_beginning
        self._raw = ""  # of what may be the mark
        self._blank = ""  # of the reasoning, if more follows
        self._reasoning = self._content = ""
        self._has_reasoning = self._has_content = False

    def push(self, text: str) -> ReasoningDelta:
        """Takes a piece."""
        for index, char in enumerate(text):
            if self._state == self._in_content and self._has_content:
                self._content += text[index:]
                break
            self._state(char)
        return self._take()

    def flush(self) -> ReasoningDelta:
        """Ends the answer."""
        self._content += self._raw
        self._raw = ""
        self._think(self._ends.release())
        return self._take()

    def _at_beginning(self, char: str) -> None:
        self._raw += char
        rest = self._raw.lstrip(_BLANK)
        if rest == self._begin:
            self._raw, self._state = "", self._in_reasoning
        elif not self._begin.startswith(rest):
            self._content, self._has_content, self._raw = self._content + self._raw, True, ""
            self._state = self._in_content

    def _in_reasoning(self, char: str) -> None:
        text, end = self._ends.push(char)
        self._think(text)
        if end is not None:
            self._state = self._in_content

    def _in_content(self, char: str) -> None:
        """White space behind the reasoning is dropped."""
        if self._has_content or char not in _BLANK:
            self._content, self._has_content = self._content + char, True

    def _think(self, text: str) -> None:
        text = self._blank + text
        kept = text.rstrip(_BLANK)
        self._blank = text[len(kept) :]
        if kept and not self._has_reasoning:
            kept, self._has_reasoning = kept.lstrip(_BLANK), True
        self._reasoning += kept

    def _take(self) -> ReasoningDelta:
        delta = ReasoningDelta(reasoning=self._reasoning, content=self._content)
        self._reasoning = self._content = ""
        return delta
