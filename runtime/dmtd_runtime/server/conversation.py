"""Messages to the prompt's token ids, as /v1/chat/completions, /v1/responses and /tokenize need them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from dmtd_runtime.async_llm import LONG_PROMPT
from dmtd_runtime.errors import RequestError
from dmtd_runtime.server.errors import invalid
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.validation import shown

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Of every API's messages; a template may name others (Llama 3's ``ipython``)."""


async def chat_prompt(
    served: Served,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    param: str = "messages",
) -> list[int]:
    """Token ids of a conversation, in a thread where it is long. ``param``: the field that it was given in.

    Raises:
        ApiError: what the template cannot do.
        RequestError: what the messages should not be.
    """
    if served.template is None:
        raise invalid(param, "this bundle has no chat template; send a prompt to /v1/completions")
    if len(messages) > served.limits.max_messages:
        raise invalid(param, f"got {len(messages)}, expected at most {served.limits.max_messages}")
    if continue_final_message and add_generation_prompt:
        raise invalid("continue_final_message", "needs add_generation_prompt: false")

    def ids() -> list[int]:
        try:
            text = render(
                served,
                messages,
                tools=tools,
                documents=documents,
                template_kwargs=template_kwargs,
                add_generation_prompt=add_generation_prompt,
            )
        except RequestError as error:  # places in messages are none of a field that is called otherwise
            if param == "messages" or not (error.param or "").startswith("messages"):
                raise
            raise invalid(param, error.problem) from None
        if continue_final_message:
            text = _up_to_its_end(text, messages[-1])
        try:
            return served.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except RequestError as error:  # of the prompt that the template made
            raise invalid(param, error.problem) from None

    if sum(len(str(message.get("content"))) for message in messages) > LONG_PROMPT or tools:
        return await asyncio.to_thread(ids)
    return ids()


def render(
    served: Served,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any] | None,
    add_generation_prompt: bool,
) -> str:
    """The prompt's text. A developer's message is the system's where the template knows no developers."""
    assert served.template is not None, "asked before whether there is one"
    source = served.template.tool_use_source if tools else served.template.source
    _check_roles(messages, source)
    if "developer" not in source:
        messages = [{**each, "role": "system"} if each.get("role") == "developer" else each for each in messages]
    given = {"tools": tools or None, "documents": documents or None, **(template_kwargs or {})}
    for name, value in given.items():
        if value is not None and name not in source:
            raise invalid(name, f"this model's chat template knows no {name}; leave it out")
    return served.template.render(
        messages,
        tools=tools or None,
        documents=documents or None,
        chat_template_kwargs=template_kwargs,
        add_generation_prompt=add_generation_prompt,
    )


def _check_roles(messages: Sequence[Message], source: str) -> None:
    """Most templates write any role as it stands; a model would read one that it has never seen."""
    for index, message in enumerate(messages):
        role = message.get("role")
        if isinstance(role, str) and role not in ROLES and not any(f"{q}{role}{q}" in source for q in "'\""):
            expected = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
            raise invalid(f"messages[{index}].role", f"got {shown(role)}, expected {expected}")


def _up_to_its_end(text: str, last: Message) -> str:
    """The prompt cut where the last message's own words end, so that the model goes on with them."""
    content = last.get("content")
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("text")
    words = content.strip() if isinstance(content, str) else ""
    place = text.rfind(words) if words else -1
    if place < 0:
        raise invalid("continue_final_message", "the last message's text does not stand in the prompt as it was sent")
    whole = content.lstrip() if isinstance(content, str) else ""
    return text[: place + len(whole)] if text.startswith(whole, place) else text[: place + len(words)]
