"""/v1/responses: a thin layer over what chats do. Nothing is kept: every request carries its whole input."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dmtd_runtime.server.conversation import chat_prompt
from dmtd_runtime.server.errors import ApiError, invalid
from dmtd_runtime.server.generation import Choice, Run
from dmtd_runtime.server.params import wanted_of
from dmtd_runtime.server.replies import Head, measured, start, whole
from dmtd_runtime.server.responses_input import form_of_body, logprobs_of, messages_of, tools_of_body
from dmtd_runtime.server.said import Listener, Said, Tools, tools_of
from dmtd_runtime.server.schema import ResponsesBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.streaming import EventStream, event
from dmtd_runtime.server.tokens import TokenTexts, chat_logprobs
from dmtd_runtime.serving.outputs import TokenLogprob

Json = dict[str, Any]
_IDS = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


async def respond(served: Served, body: ResponsesBody, http: HttpRequest) -> Response:
    """Answer one request."""
    model = served.check_model(body.model)
    asked = ("max_output_tokens", body.max_output_tokens)
    given, choice = tools_of_body(body)
    tools = tools_of(served, given, choice, parallel=body.parallel_tool_calls)
    form = form_of_body(body, served.limits)
    if form is not None and tools.form is not None:
        raise invalid(
            "tool_choice", "the answer is a call, which cannot be of the form of text.format; give one of them"
        )
    wanted = wanted_of(
        body,
        served.llm.default_params,
        served.limits,
        max_tokens=asked,
        logprobs=("top_logprobs", logprobs_of(body)),
        form=form or tools.form,
    )
    effort = body.reasoning.effort if body.reasoning else None
    kwargs = {"reasoning_effort": effort} if effort else {}
    ids = await chat_prompt(served, messages_of(body), tools=tools.rendered, template_kwargs=kwargs, param="input")
    head = Head.of(http, "resp", "response", model)
    run = await start(served, body, head, [ids], wanted, param="input", asked=asked)
    writer = _Writer(served, body, head, run, tools)
    if not body.stream:
        return await whole(http, run, writer.answer)
    return EventStream(
        writer.events(),
        close=run.aclose,
        error_event=writer.error,
    )


class _Writer:
    """The answer to one request, whole or as events; both are made of the same items."""

    def __init__(self, served: Served, body: ResponsesBody, head: Head, run: Run, tools: Tools) -> None:
        self._body, self._head, self._run, self._tools = body, head, run, tools
        has_form = run.wanted.params.structured_outputs is not None
        self._listener = Listener(served, tools, run.prompts[0], has_form=has_form)
        self._texts = TokenTexts(served.tokenizer, as_ids=False)
        self._items: list[Json] = []
        self._call: int | None = None  # the call that the last item is
        self._num_events = 0

    async def answer(self, run: Run) -> Json:
        """The response at its end."""
        [choice] = await run.choices()
        for _ in self._say(self._listener.push(choice.text, last=True), choice.logprobs):
            pass
        for _ in self._close():
            pass
        return self._response(choice)

    async def events(self) -> AsyncIterator[bytes]:
        """Events from the response's creation to its completion."""
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        choice = Choice(index=0)
        async for _, piece in self._run:
            choice.add(piece)
            said = self._listener.push(piece.text, last=piece.finish_reason is not None)
            for each in self._say(said, list(piece.logprobs)):
                yield each
        for each in self._close():
            yield each
        response = self._response(choice)
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> bytes:
        """The event that ends a stream that failed."""
        return self._event("error", message=error.message, code=error.code, param=error.param)

    def _event(self, event_name: str, /, **more: Any) -> bytes:
        self._num_events += 1
        return event({"type": event_name, "sequence_number": self._num_events - 1, **more}, event_name)

    def _say(self, said: Said, logprobs: list[TokenLogprob]) -> Iterator[bytes]:
        """Take a piece; the events of it."""
        if said.reasoning:
            yield from self._text("reasoning", "reasoning_text", said.reasoning, [])
        if said.content or (logprobs and not said.reasoning and not said.calls):
            told = chat_logprobs(self._texts, logprobs)["content"] if logprobs else []
            yield from self._text("message", "output_text", said.content, told)
        for call in said.calls:
            if call.name is not None:
                yield from self._close()
                facts = {"call_id": call.id, "name": call.name, "arguments": ""}
                yield from self._open("function_call", **facts)
                self._call = call.index
            if call.arguments:
                self._items[-1]["arguments"] += call.arguments
                yield self._of_item("response.function_call_arguments.delta", delta=call.arguments)

    def _text(self, kind: str, part_kind: str, text: str, logprobs: list[Json]) -> Iterator[bytes]:
        more: Json = {"logprobs": logprobs} if part_kind == "output_text" else {}
        if not self._is_open(kind):
            yield from self._close()
            part: Json = {"type": part_kind, "text": ""}
            if part_kind == "output_text":
                part |= {"annotations": [], "logprobs": []}
            facts: Json = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._open(kind, **facts, content=[])
            self._items[-1]["content"].append(part)
            yield self._of_item("response.content_part.added", content_index=0, part=part)
        part = self._items[-1]["content"][0]
        part["text"] += text
        part.get("logprobs", []).extend(logprobs)
        yield self._of_item(f"response.{part_kind}.delta", content_index=0, delta=text, **more)

    def _is_open(self, kind: str) -> bool:
        return bool(self._items) and self._items[-1]["type"] == kind and self._items[-1]["status"] == "in_progress"

    def _open(self, kind: str, /, **facts: Any) -> Iterator[bytes]:
        item = {"id": f"{_IDS[kind]}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress", **facts}
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self) -> Iterator[bytes]:
        """End the item that is open."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            facts = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **facts)
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._of_item(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_item(self, event_name: str, /, **more: Any) -> bytes:
        return self._event(event_name, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **more)

    def _response(self, choice: Choice | None) -> Json:
        """The response as it is; ``choice``: its end."""
        body, params, run = self._body, self._run.wanted.params, self._run
        cut = choice is not None and choice.finish_reason == "length"
        status = "in_progress" if choice is None else "incomplete" if cut else "completed"
        if cut and self._items:
            self._items[-1]["status"] = "incomplete"
        usage = {
            "input_tokens": run.prompt_tokens,
            "input_tokens_details": {"cached_tokens": run.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": run.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": run.prompt_tokens + run.completion_tokens,
        }
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "model": self._head.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"type": "function", **tool["function"]} for tool in self._tools.rendered],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if choice is None else usage,
            "user": body.user,
            "dmtd": None if choice is None else measured(run, body),
        }
