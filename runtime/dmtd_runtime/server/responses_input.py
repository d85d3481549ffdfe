"""The input of /v1/responses as a conversation: items become messages, tools lose the layer that chats have more."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dmtd_runtime.server.errors import invalid
from dmtd_runtime.server.forms import Form, made, schema_form
from dmtd_runtime.server.options import Limits
from dmtd_runtime.server.schema import FunctionBody, NamedFunction, NamedTool, ResponsesBody, ToolBody
from dmtd_runtime.server.validation import of_validation, shown

_TEXTS = ("input_text", "output_text", "text")
_LOGPROBS = "message.output_text.logprobs"
_HARMLESS_INCLUDES = ("reasoning.encrypted_content",)

Message = dict[str, Any]


def messages_of(body: ResponsesBody) -> list[Message]:
    """The conversation.

    Raises:
        ApiError: 400; an item that is no text and no call of a function.
    """
    messages: list[Message] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    thoughts = ""
    for index, item in enumerate(body.input):
        where, kind = f"input[{index}]", item.get("type", "message")
        if kind == "reasoning":
            thoughts = _text(f"{where}.content", item.get("content") or [], ("reasoning_text", "text"))
            continue
        message = _message(where, kind, item)
        if message["role"] == "assistant" and thoughts:
            message["reasoning_content"], thoughts = thoughts, ""
        last = messages[-1] if messages else {}
        if kind == "function_call" and last.get("role") == "assistant":  # parallel calls are one message
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def tools_of_body(body: ResponsesBody) -> tuple[list[ToolBody], str | NamedTool | None]:
    """Functions and the choice among them; tools of other kinds are skipped, as clients send what they have."""
    tools = []
    for index, tool in enumerate(body.tools or ()):
        if tool.get("type") == "function":
            function = {name: value for name, value in tool.items() if name != "type" and value is not None}
            try:
                tools.append(ToolBody(type="function", function=FunctionBody.model_validate(function)))
            except ValidationError as error:
                raise of_validation(FunctionBody, error.errors(), function, at=f"tools[{index}]") from None
    choice = body.tool_choice
    if isinstance(choice, dict):
        name = choice.get("name")
        if choice.get("type") != "function" or not isinstance(name, str):
            raise invalid("tool_choice", "got an object, expected {type: function, name}")
        return tools, NamedTool(function=NamedFunction(name=name))
    if choice not in (None, "none", "auto", "required"):
        raise invalid("tool_choice", f"got {shown(choice)}, expected none, auto, required or an object")
    return tools, choice


def form_of_body(body: ResponsesBody, limits: Limits) -> Form | None:
    """The form that ``text.format`` asks for."""
    format = (body.text.format if body.text else None) or {"type": "text"}
    kind, schema = format.get("type"), format.get("schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return made("text.format", json_object=True)
    if kind != "json_schema" or not isinstance(schema, dict):
        raise invalid("text.format", "expected the type text, json_object, or json_schema with a schema")
    return schema_form("text.format", schema, limits)


def logprobs_of(body: ResponsesBody) -> int | None:
    """How many log probabilities a token has; None: none are told."""
    for each in body.include or ():
        if each not in (_LOGPROBS, *_HARMLESS_INCLUDES):
            raise invalid("include", f"got {each[:60]!r}, expected {_LOGPROBS} or nothing")
    return (body.top_logprobs or 0) if _LOGPROBS in (body.include or ()) or body.top_logprobs else None


def _message(where: str, kind: object, item: Message) -> Message:
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise invalid(f"{where}.role", "expected user, assistant, system or developer")
        return {"role": role, "content": _text(f"{where}.content", item.get("content"), _TEXTS)}
    if kind == "function_call":
        names = [item.get(name) for name in ("call_id", "name", "arguments")]
        if not all(isinstance(each, str) for each in names):
            raise invalid(where, "expected call_id, name and arguments of a function_call as text")
        function = {"name": names[1], "arguments": names[2]}
        return {"role": "assistant", "tool_calls": [{"id": names[0], "type": "function", "function": function}]}
    if kind == "function_call_output":
        content = _text(f"{where}.output", item.get("output"), _TEXTS)
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    raise invalid(f"{where}.type", "expected message, function_call, function_call_output or reasoning")


def _text(where: str, content: Any, kinds: tuple[str, ...]) -> str:
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)):
            raise invalid(where, "expected text, or parts that are text: this model reads text")
    return "".join(part["text"] for part in parts)
