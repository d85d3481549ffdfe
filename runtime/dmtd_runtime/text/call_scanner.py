"""The JSON object of one tool call, character by character: its name, and its arguments as soon as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable

_BLANK = " \t\r\n"
_PLAIN = frozenset("0123456789+-.abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_NESTED = _PLAIN | frozenset("{}[],:" + _BLANK)


class CallScanner:
    """Reads ``{"name": ..., "arguments": {...}}``, keys in any order, others passed over; ``parameters`` are arguments too.

    What cannot be JSON makes it ``bad``; brackets are counted, not matched.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = self.bad = False
        self._state: Callable[[str], None] = self._start
        self._key = ""
        self._raw = ""  # of the key or value under way
        self._depth = 0
        self._in_string = self._escaped = False
        self._has_arguments = False
        self._are_arguments = False  # the value under way
        self._fresh = ""

    @property
    def ready(self) -> bool:
        """Whether the call can be told: it has its name, and arguments have begun."""
        return self.name is not None and self._has_arguments

    def push(self, char: str) -> None:
        """Takes a character; none follows the end."""
        assert not self.done and not self.bad, "the object has ended"
        self._state(char)

    def take(self) -> str:
        """Text of the arguments that nobody has taken."""
        fresh, self._fresh = self._fresh, ""
        return fresh

    def without_arguments(self) -> None:
        """At the end: no arguments are no parameters."""
        if not self._has_arguments:
            self._has_arguments, self._fresh = True, "{}"

    def _start(self, char: str) -> None:
        self._expect(char, {"{": self._before_key})

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._raw, self._state = char, self._key_text
        elif char == "}":
            self.done = True
        elif char not in _BLANK:
            self.bad = True

    def _key_text(self, char: str) -> None:
        if self._ends_text(char):
            self._key, self._state = self._decoded(), self._before_colon

    def _before_colon(self, char: str) -> None:
        self._expect(char, {":": self._before_value})

    def _before_value(self, char: str) -> None:
        if char in _BLANK:
            return
        self._raw = char
        self._are_arguments = self._key in ("arguments", "parameters") and not self._has_arguments
        if char == '"':
            self._state = self._text
        elif self._key == "name":
            self.bad = True
        elif char in "{[":
            self._depth, self._in_string, self._state = 1, False, self._nested
            if self._are_arguments:
                self._has_arguments, self._fresh = True, char
        elif char in _PLAIN:
            self._state = self._literal
        else:
            self.bad = True

    def _text(self, char: str) -> None:
        if not self._ends_text(char):
            return
        self._state, text = self._after_value, self._decoded()
        if self._key == "name" and self.name is None:
            self.name = text
        elif self._are_arguments:  # JSON in a string: what it says
            self._has_arguments, self._fresh = True, text

    def _nested(self, char: str) -> None:
        if self._in_string:
            self._in_string = not self._ends_text(char)
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        elif char not in _NESTED:
            self.bad = True
            return
        if self._are_arguments:
            self._fresh += char
        if self._depth == 0:
            self._state = self._after_value

    def _literal(self, char: str) -> None:
        if char in _PLAIN:
            self._raw += char
            return
        if self._are_arguments:
            self._has_arguments, self._fresh = True, "{}" if self._raw == "null" else self._raw
        self._after_value(char)

    def _after_value(self, char: str) -> None:
        self._state = self._after_value
        if char == "}":
            self.done = True
        else:
            self._expect(char, {",": self._before_key})

    def _expect(self, char: str, following: dict[str, Callable[[str], None]]) -> None:
        if char in following:
            self._state = following[char]
        elif char not in _BLANK:
            self.bad = True

    def _ends_text(self, char: str) -> bool:
        """Takes a character of a string behind its first quote; whether it is the last."""
        self._raw += char
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        else:
            return char == '"'
        return False

    def _decoded(self) -> str:
        try:
            text: str = json.loads(self._raw, strict=False)
            text.encode()
        except ValueError:  # UnicodeEncodeError is one
            self.bad = True
            return ""
        return text
