"""/v1/chat/completions: conversations, answered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dmtd_runtime.server.conversation import chat_prompt
from dmtd_runtime.server.errors import invalid
from dmtd_runtime.server.generation import Choice, Run
from dmtd_runtime.server.params import wanted_of
from dmtd_runtime.server.replies import Head, start, usage, wants_usage, whole
from dmtd_runtime.server.schema import ChatBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.streaming import DONE, EventStream, event
from dmtd_runtime.server.tokens import TokenTexts, chat_logprobs
from dmtd_runtime.serving.outputs import Delta


async def chat(served: Served, body: ChatBody, http: HttpRequest) -> Response:
    """Answer one request."""
    model = served.check_model(body.model)
    asked = _asked(body)
    logprobs = ("top_logprobs", _logprobs(body))
    wanted = wanted_of(body, served.llm.default_params, served.limits, max_tokens=asked, logprobs=logprobs)
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    ids = await chat_prompt(
        served,
        body.messages,
        documents=body.documents,
        template_kwargs=kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=bool(body.add_special_tokens),
    )
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = Head.of(http, "chatcmpl", kind, model, body.request_id)
    run = await start(served, body, head, [ids], wanted, param="messages", asked=asked)
    writer = _Writer(served, body, head, run)
    if not body.stream:
        return await whole(http, run, writer.answer)
    return EventStream(writer.events(), close=run.aclose, write_timeout_s=served.limits.write_timeout_s)


def _asked(body: ChatBody) -> tuple[str, int | None]:
    """The answer's length, with the name of the field that it was given in."""
    if body.max_completion_tokens is not None:
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

    def __init__(self, served: Served, body: ChatBody, head: Head, run: Run) -> None:
        self._body, self._head, self._run = body, head, run
        self._texts = TokenTexts(served.llm.tokenizer, as_ids=body.return_tokens_as_token_ids)

    async def answer(self, run: Run) -> dict[str, Any]:
        """All choices."""
        choices = await run.choices()
        told = self._head.body(choices=[self._choice(each) for each in choices], usage=usage(run))
        return told | {"prompt_token_ids": run.prompts[0]} if self._body.return_token_ids else told

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
            yield event(self._head.body(choices=[], usage=usage(self._run)))
        yield DONE

    def _choice(self, choice: Choice) -> dict[str, Any]:
        told: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(self._texts, choice.logprobs) if self._body.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        return told | {"token_ids": choice.token_ids} if self._body.return_token_ids else told

    def _pieces(self, index: int, piece: Delta) -> list[dict[str, Any]]:
        told: dict[str, Any] = {
            "index": index,
            "delta": {"content": piece.text} if piece.text or piece.logprobs else {},
            "logprobs": chat_logprobs(self._texts, piece.logprobs) if piece.logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            told["stop_reason"] = piece.stop_reason
        if self._body.return_token_ids:
            told["token_ids"] = list(piece.token_ids)
        elif not told["delta"] and piece.finish_reason is None:
            return []
        return [told]
