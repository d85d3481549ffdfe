"""/v1/chat/completions: conversations, answered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dmtd_runtime.server.conversation import chat_prompt
from dmtd_runtime.server.errors import invalid
from dmtd_runtime.server.forms import form_of
from dmtd_runtime.server.generation import Choice, Run
from dmtd_runtime.server.params import wanted_of
from dmtd_runtime.server.replies import Head, measured, start, usage, wants_usage, whole
from dmtd_runtime.server.said import Listener, Tools, tools_of
from dmtd_runtime.server.schema import ChatBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.streaming import DONE, EventStream, event
from dmtd_runtime.server.tokens import TokenTexts, chat_logprobs, prompt_logprobs
from dmtd_runtime.serving.outputs import Delta
from dmtd_runtime.text.tool_calls import ToolCallDelta, whole_calls


async def chat(served: Served, body: ChatBody, http: HttpRequest) -> Response:
    """Answer one request."""
    model = served.check_model(body.model)
    asked = _asked(body)
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "are told with whole answers alone; leave out stream")
    logprobs = ("top_logprobs", _logprobs(body))
    tools = tools_of(served, body.tools, body.tool_choice, parallel=body.parallel_tool_calls)
    form = form_of(body, served.limits)
    if form is not None and tools.form is not None:
        raise invalid(
            "tool_choice", f"the answer is a call, which cannot be of the form of {form[0]}; give one of them"
        )
    wanted = wanted_of(
        body, served.llm.default_params, served.limits, max_tokens=asked, logprobs=logprobs, form=form or tools.form
    )
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    ids = await chat_prompt(
        served,
        body.messages,
        tools=tools.rendered,
        documents=body.documents,
        template_kwargs=kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=bool(body.add_special_tokens),
    )
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = Head.of(http, "chatcmpl", kind, model, body.request_id)
    run = await start(served, body, head, [ids], wanted, param="messages", asked=asked)
    writer = _Writer(served, body, head, run, tools)
    if not body.stream:
        return await whole(http, run, writer.answer)
    return EventStream(writer.events(), close=run.aclose)


def _asked(body: ChatBody) -> tuple[str, int | None]:
    """The answer's length, with the name of the field that it was given in."""
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise invalid(
                "max_tokens",
                f"got {body.max_tokens} beside max_completion_tokens {body.max_completion_tokens}; give one",
            )
        return "max_completion_tokens", body.max_completion_tokens
    return "max_tokens", body.max_tokens


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is None:
        return 0 if body.logprobs else None
    if not body.logprobs and body.top_logprobs:
        raise invalid("top_logprobs", "needs logprobs: true")
    if body.top_logprobs < 0:
        raise invalid("top_logprobs", f"got {body.top_logprobs}, expected 0 or more")
    return body.top_logprobs if body.logprobs else None


class _Writer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, served: Served, body: ChatBody, head: Head, run: Run, tools: Tools) -> None:
        self._body, self._head, self._run = body, head, run
        has_form = run.wanted.params.structured_outputs is not None
        self._listeners = [Listener(served, tools, run.prompts[0], has_form=has_form) for _ in range(run.num_choices)]
        self._texts = TokenTexts(served.llm.tokenizer, as_ids=body.return_tokens_as_token_ids)

    async def answer(self, run: Run) -> dict[str, Any]:
        """All choices."""
        choices = await run.choices()
        told = self._head.body(choices=[self._choice(each) for each in choices], usage=usage(run))
        return told | self._of_the_prompt() | {"dmtd": measured(run, self._body)}

    async def events(self) -> AsyncIterator[bytes]:
        """The role, a chunk for each piece, and the closing ones. Clients add up what deltas say: all is said once."""
        at_end, always = wants_usage(self._body)

        def chunk(choice: dict[str, Any], **more: Any) -> bytes:
            told = self._head.body(choices=[choice], **more)
            return event(told | {"usage": usage(self._run)} if always else told)

        for index in range(self._run.num_choices):
            delta = {"role": "assistant", "content": ""}
            more = {"prompt_token_ids": self._run.prompts[0]} if self._body.return_token_ids and not index else {}
            yield chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, **more)
        async for index, piece in self._run:
            for choice in self._pieces(index, piece):
                yield chunk(choice)
        if at_end:
            yield event(self._head.body(choices=[], usage=usage(self._run), dmtd=measured(self._run, self._body)))
        yield DONE

    def _of_the_prompt(self) -> dict[str, Any]:
        """What was asked of it beside the answer."""
        told: dict[str, Any] = {"prompt_token_ids": self._run.prompts[0]} if self._body.return_token_ids else {}
        if self._body.prompt_logprobs is not None:
            told |= {"prompt_logprobs": prompt_logprobs(self._texts, self._run.prompt_logprobs(0))}
        return told

    def _finish_reason(self, listener: Listener, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and listener.has_called else reason

    def _choice(self, choice: Choice) -> dict[str, Any]:
        listener = self._listeners[choice.index]
        said = listener.push(choice.text, last=True)
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in whole_calls(said.calls)
        ]
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if calls:
            message |= {"content": said.content or None, "tool_calls": calls}
        if said.reasoning and self._body.include_reasoning:
            message["reasoning_content"] = said.reasoning
        told: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(self._texts, choice.logprobs) if self._body.logprobs else None,
            "finish_reason": self._finish_reason(listener, choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }
        return told | {"token_ids": choice.token_ids} if self._body.return_token_ids else told

    def _pieces(self, index: int, piece: Delta) -> list[dict[str, Any]]:
        """Chunks of a piece: thoughts, then content, then calls; what is told of tokens stands in the last."""
        listener, last = self._listeners[index], piece.finish_reason is not None
        said = listener.push(piece.text, last=last)
        deltas: list[dict[str, Any]] = []
        if said.reasoning and self._body.include_reasoning:
            deltas.append({"reasoning_content": said.reasoning})
        if said.content:
            deltas.append({"content": said.content})
        if said.calls:
            deltas.append({"tool_calls": [_call_delta(call) for call in said.calls]})
        if not deltas and (last or piece.logprobs or self._body.return_token_ids):
            deltas.append({"content": ""} if piece.logprobs else {})
        told: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if told:
            end = told[-1]
            end["logprobs"] = chat_logprobs(self._texts, piece.logprobs) if piece.logprobs else None
            if self._body.return_token_ids:
                end["token_ids"] = list(piece.token_ids)
            if last:
                end["finish_reason"] = self._finish_reason(listener, piece.finish_reason)
                end["stop_reason"] = piece.stop_reason
        return told


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    """A piece of a call; clients add up strings, so that its id and name are told once."""
    function = {"arguments": call.arguments} if call.name is None else {"name": call.name, "arguments": call.arguments}
    told: dict[str, Any] = {"index": call.index, "function": function}
    return told if call.id is None else {"id": call.id, "type": "function", **told}
