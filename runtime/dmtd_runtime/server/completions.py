"""/v1/completions: prompts as text or token ids, continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dmtd_runtime.async_llm import LONG_PROMPT
from dmtd_runtime.server.errors import invalid
from dmtd_runtime.server.forms import form_of
from dmtd_runtime.server.generation import Choice, Run
from dmtd_runtime.server.params import wanted_of
from dmtd_runtime.server.replies import Head, measured, start, usage, wants_usage, whole
from dmtd_runtime.server.schema import CompletionBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.streaming import DONE, EventStream, event
from dmtd_runtime.server.tokens import TokenTexts, completion_logprobs, prompt_logprobs
from dmtd_runtime.serving.outputs import TokenLogprob

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, and vLLM's."""


async def complete(served: Served, body: CompletionBody, http: HttpRequest) -> Response:
    """Answer one request."""
    model = served.check_model(body.model)
    _check(body)
    asked = ("max_tokens", body.max_tokens)
    # Without an answer the prompt alone is echoed; the engine makes a token that nobody sees.
    given = ("max_tokens", DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens or 1)
    wanted = wanted_of(
        body,
        served.llm.default_params,
        served.limits,
        max_tokens=given,
        logprobs=("logprobs", body.logprobs),
        form=form_of(body, served.limits),
    )
    if body.echo and body.logprobs is not None:
        most = max(body.logprobs, body.prompt_logprobs or 0)
        wanted = replace(wanted, params=replace(wanted.params, prompt_logprobs=most))
    prompts = await _token_ids(served, body)
    head = Head.of(http, "cmpl", "text_completion", model, body.request_id)
    run = await start(served, body, head, prompts, wanted, param="prompt", asked=asked)
    writer = _Writer(served, body, head, run)
    if not body.stream:
        return await whole(http, run, writer.answer)
    return EventStream(writer.events(), close=run.aclose)


def _check(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != body.n:
        raise invalid("best_of", f"got {body.best_of}, expected n ({body.n}): all sequences are returned")
    if body.logprobs is not None and body.logprobs < 0:
        raise invalid("logprobs", f"got {body.logprobs}, expected 0 or more")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "got 0 without echo, expected 1 or more")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid(
            "prompt_logprobs", "are told with whole answers alone; leave out stream, or send echo and logprobs"
        )


async def _token_ids(served: Served, body: CompletionBody) -> list[list[int]]:
    prompt: Any = body.prompt
    listed: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    if not listed or not all(listed):
        raise invalid("prompt", "got an empty prompt, expected text or token ids")
    if len(listed) > served.limits.max_prompts:
        raise invalid("prompt", f"got {len(listed)} prompts, expected at most {served.limits.max_prompts}")
    special = body.add_special_tokens is not False

    def ids(one: Any) -> list[int]:
        return served.tokenizer.encode(one, add_special_tokens=special) if isinstance(one, str) else one

    if sum(map(len, listed)) > LONG_PROMPT:
        return await asyncio.to_thread(lambda: [ids(one) for one in listed])
    return [ids(one) for one in listed]


class _Writer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, served: Served, body: CompletionBody, head: Head, run: Run) -> None:
        self._body, self._head, self._run = body, head, run
        self._texts = TokenTexts(served.llm.tokenizer, as_ids=body.return_tokens_as_token_ids)
        prompt: Any = body.prompt
        given = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        self._echoed = [
            one if isinstance(one, str) else "" if served.llm.tokenizer is None else served.llm.tokenizer.decode(one)
            for one in (given if body.echo else ())
        ]

    async def answer(self, run: Run) -> dict[str, Any]:
        """All choices."""
        choices = await run.choices()
        told = self._head.body(choices=[self._choice(self._cut(each), echo=True) for each in choices], usage=usage(run))
        if self._body.max_tokens == 0:
            told["usage"] = usage(run, completion_tokens=0)
        return told | {"dmtd": measured(run, self._body)}

    async def events(self) -> AsyncIterator[bytes]:
        """A chunk for each piece, and the closing ones. A prompt that is echoed stands before its first."""
        at_end, always = wants_usage(self._body)
        offsets: dict[int, int] = {}
        async for index, delta in self._run:
            first = index not in offsets
            told_nothing = not (delta.text or delta.logprobs or delta.finish_reason or self._body.return_token_ids)
            if told_nothing and not (first and self._body.echo):
                continue
            chunk = Choice(index=index)
            chunk.add(delta)
            chunk = self._cut(chunk)
            choice = self._choice(chunk, echo=first, offset=offsets.get(index, 0))
            offsets[index] = offsets.get(index, 0) + len(choice["text"])
            told = self._head.body(choices=[choice])
            yield event(told | {"usage": usage(self._run)} if always else told)
        if at_end:
            yield event(self._head.body(choices=[], usage=usage(self._run), dmtd=measured(self._run, self._body)))
        yield DONE

    def _cut(self, choice: Choice) -> Choice:
        """Without the answer where none was wanted."""
        if self._body.max_tokens != 0:
            return choice
        return Choice(index=choice.index, finish_reason=choice.finish_reason and "length")

    def _choice(self, choice: Choice, *, echo: bool, offset: int = 0) -> dict[str, Any]:
        """A choice, or a piece of one that begins at ``offset``; ``echo``: the prompt stands before it, if it was asked for."""
        place = choice.index // self._run.wanted.n
        echoed = self._echoed[place] if echo and self._body.echo else ""
        told: dict[str, Any] = {
            "index": choice.index,
            "text": echoed + choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._body.logprobs is not None:
            told["logprobs"] = self._logprobs(choice, place, with_prompt=echo and self._body.echo, offset=offset)
        if self._body.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_logprobs(self._texts, self._run.prompt_logprobs(place))
        if self._body.return_token_ids:
            told["token_ids"], told["prompt_token_ids"] = choice.token_ids, self._run.prompts[place]
        return told

    def _logprobs(self, choice: Choice, place: int, *, with_prompt: bool, offset: int) -> dict[str, Any] | None:
        ids, logprobs = choice.token_ids, list[TokenLogprob | None](choice.logprobs)
        if with_prompt:
            ids, logprobs = [*self._run.prompts[place], *ids], [*self._run.prompt_logprobs(place), *logprobs]
        return completion_logprobs(self._texts, logprobs, ids, offset=offset) if ids else None
