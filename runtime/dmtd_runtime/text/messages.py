"""What a caller hands to a chat template, checked and copied into plain JSON values: messages, tools, documents.

Flow: the caller's objects -> here -> ``chat_template.ChatTemplate`` renders them. The rules are those of transformers 5:

1. A message is an object with a role and a content, a dataclass or a pydantic model (what OpenAI's client returns).
2. A key whose value is null counts as absent, and so does an empty list of calls: a message as ``model_dump()`` writes it
   is the same as one written by hand.
3. What a message thought has one name more for every name that templates know (``reasoning_content``, ``thinking``).
4. Text parts stay a list for a template that reads lists, and are joined by line breaks for every other.

Nothing here renders; who calls a function and says nothing has no content, which the template is asked to write.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dmtd_errors.words import kind_of, shown
from dmtd_runtime.errors import RequestError

MAX_MESSAGES = 4096
MAX_MESSAGE_CHARS = 16 << 20
"""Of all strings in messages, tools, documents and the template's arguments together."""
MAX_DEPTH = 64
MAX_ROLE_CHARS = 64

_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


class Budget:
    """Copies values into plain JSON types and counts their characters.

    Templates so get fresh values whose methods the sandbox knows, and cannot change the caller's.
    """

    def __init__(self, max_chars: int = MAX_MESSAGE_CHARS) -> None:
        self._max_chars = max_chars
        self._left = max_chars

    def plain(self, value: object, param: str = "messages", depth: int = 0) -> Any:
        """The value as JSON has it.

        Raises:
            RequestError: Something that JSON has not, nested too deep, or beyond the budget.
        """
        if depth > MAX_DEPTH:
            raise RequestError(f"got values nested more than {MAX_DEPTH} deep, expected fewer levels", param=param)
        self._spend(1, param)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            self._spend(len(value), param)
            return str.__str__(value)
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, Mapping):
            return {self._key(key, param): self.plain(item, param, depth + 1) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
            return [self.plain(item, param, depth + 1) for item in value]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inside = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return self.plain(inside, param, depth + 1)
        if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
            return self.plain(dump(), param, depth + 1)
        raise RequestError(
            f"got a value of type {type(value).__name__}, expected JSON values "
            "(text, numbers, true / false, null, lists, objects)",
            param=param,
        )

    def _key(self, key: object, param: str) -> str:
        if not isinstance(key, str):
            raise RequestError(
                f"got an object with a key of type {type(key).__name__}, expected text keys", param=param
            )
        self._spend(len(key), param)
        return str.__str__(key)

    def _spend(self, chars: int, param: str) -> None:
        self._left -= chars
        if self._left < 0:
            raise RequestError(f"got more than {self._max_chars} characters, expected fewer; shorten them", param=param)


def checked_messages(messages: object, budget: Budget, *, keeps_parts: bool) -> list[Message]:
    """A conversation as templates get it; a message that only calls functions has no ``content``.

    Args:
        messages: The caller's.
        budget: What copies them.
        keeps_parts: Whether the template reads a list of text parts.

    Raises:
        RequestError: Not a conversation, in one line that names the place.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError(f"got {kind_of(messages)}, expected a list of {{role, content}} objects", param="messages")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"got {len(messages)} messages, expected 1 to {MAX_MESSAGES}", param="messages")
    return [_checked_message(f"messages[{i}]", each, budget, keeps_parts) for i, each in enumerate(messages)]


def checked_objects(values: object, param: str, expected: str, budget: Budget) -> list[Message] | None:
    """A list of objects (``tools``, ``documents``), or None.

    Raises:
        RequestError: Anything else.
    """
    if values is None:
        return None
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RequestError(f"got {kind_of(values)}, expected a list of {expected}", param=param)
    plain = [budget.plain(value, param) for value in values]
    for given, value in zip(values, plain, strict=True):
        if not isinstance(value, dict):
            raise RequestError(f"got {kind_of(given)}, expected {expected}", param=param)
    return plain


def calls_of(message: Message) -> Iterator[Message]:
    """The objects that name a called function: OpenAI's ``function``, a call without one, the old ``function_call``."""
    for call in message.get("tool_calls", ()):
        yield call.get("function", call)
    if "function_call" in message:
        yield message["function_call"]


def _checked_message(where: str, message: object, budget: Budget, keeps_parts: bool) -> Message:
    given = budget.plain(message) if not isinstance(message, str | int | float | None) else None
    if not isinstance(given, dict):
        raise RequestError(f"got {kind_of(message)}, expected an object with role and content", param=where)
    plain = {key: value for key, value in given.items() if value is not None}
    if plain.get("tool_calls") == []:
        del plain["tool_calls"]
    role = plain.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= MAX_ROLE_CHARS:
        raise RequestError(f"got {shown(role)}, expected text such as system, user or assistant", param=f"{where}.role")
    _check_calls(where, plain)
    if "content" in plain:
        plain["content"] = _checked_content(f"{where}.content", plain["content"], keeps_parts)
    elif not any(True for _ in calls_of(plain)):
        raise RequestError("got null, expected text or a list of text parts", param=f"{where}.content")
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _check_calls(where: str, message: Message) -> None:
    expected = '{"type": "function", "function": {"name": ..., "arguments": ...}}'
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"got {shown(calls)}, expected a list of {expected}", param=f"{where}.tool_calls")
    for function in calls_of(message):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"got {shown(function)}, expected {expected}", param=f"{where}.tool_calls")


def _checked_content(where: str, content: object, keeps_parts: bool) -> str | list[Message]:
    if isinstance(content, list):
        texts = [_part_text(f"{where}[{i}]", part) for i, part in enumerate(content)]
        return [{"type": "text", **part} for part in content] if keeps_parts else "\n".join(texts)
    if not isinstance(content, str):
        raise RequestError(f"got {shown(content)}, expected text or a list of text parts", param=where)
    return whole_text(content, where)


def _part_text(where: str, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise RequestError(
            f'got {shown(part)}, expected {{"type": "text", "text": ...}}: this model reads text', param=where
        )
    return whole_text(text, where)


def whole_text(text: str, param: str) -> str:
    """Text that UTF-8 can write.

    Raises:
        RequestError: half a surrogate pair is in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"got half a surrogate pair at character {error.start}, expected text that UTF-8 can write; remove it",
            param=param,
        ) from None
    return text
