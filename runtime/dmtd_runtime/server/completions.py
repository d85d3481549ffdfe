"""/v1/completions: prompts as text or token ids, continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dmtd_runtime.async_llm import LONG_PROMPT
from dmtd_runtime.server.errors import invalid
from dmtd_runtime.server.generation import Choice, Run
from dmtd_runtime.server.params import wanted_of
from dmtd_runtime.server.replies import Head, start, usage, wants_usage, whole
from dmtd_runtime.server.schema import CompletionBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.streaming import DONE, EventStream, event
from dmtd_runtime.server.tokens import TokenTexts, completion_logprobs

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, and vLLM's."""


async def complete(served: Served, body: CompletionBody, http: HttpRequest) -> Response:
    """Answer one request."""
    model = served.check_model(body.model)
    _check(body)
    asked = ("max_tokens", body.max_tokens)
    given = ("max_tokens", DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
    defaults = served.llm.default_params
    wanted = wanted_of(body, defaults, served.limits, max_tokens=given, logprobs=("logprobs", body.logprobs))
    prompts = await _token_ids(served, body)
    head = Head.of(http, "cmpl", "text_completion", model, body.request_id)
    run = await start(served, body, head, prompts, wanted, param="prompt", asked=asked)
    writer = _Writer(served, body, head, run)
    if not body.stream:
        return await whole(http, run, writer.answer)
    return EventStream(writer.events(), close=run.aclose, write_timeout_s=served.limits.write_timeout_s)


def _check(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != body.n:
        raise invalid("best_of", f"got {body.best_of}, expected n ({body.n}): all sequences are returned")
    if body.logprobs is not None and body.logprobs < 0:
        raise invalid("logprobs", f"got {body.logprobs}, expected 0 or more")
    if body.prompt_logprobs is not None or (body.echo and body.logprobs is not None):
        name = "prompt_logprobs" if body.prompt_logprobs is not None else "echo"
        raise invalid(name, "log probabilities of prompts are not served yet; leave it out")


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
        return self._head.body(choices=[self._choice(each) for each in choices], usage=usage(run))

    async def events(self) -> AsyncIterator[bytes]:
        """A chunk for each piece, and the closing ones."""
        at_end, always = wants_usage(self._body)
        offsets = dict.fromkeys(range(self._run.num_choices), 0)
        for index in offsets if self._body.echo else ():
            chunk = Choice(index=index, text=self._echo(index))
            yield event(self._head.body(choices=[self._choice(chunk, echo=False)]))
            offsets[index] = len(chunk.text)
        async for index, delta in self._run:
            if not (delta.text or delta.logprobs or delta.finish_reason or self._body.return_token_ids):
                continue
            chunk = Choice(index=index)
            chunk.add(delta)
            told = self._head.body(choices=[self._choice(chunk, echo=False, offset=offsets[index])])
            offsets[index] += len(delta.text)
            yield event(told | {"usage": usage(self._run)} if always else told)
        if at_end:
            yield event(self._head.body(choices=[], usage=usage(self._run)))
        yield DONE

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._run.wanted.n] if self._body.echo else ""

    def _choice(self, choice: Choice, *, echo: bool = True, offset: int = 0) -> dict[str, Any]:
        text = self._echo(choice.index) if echo else ""
        told: dict[str, Any] = {
            "index": choice.index,
            "text": text + choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._body.logprobs is not None and choice.logprobs:
            told["logprobs"] = completion_logprobs(
                self._texts, choice.logprobs, choice.token_ids, offset=offset + len(text)
            )
        if self._body.return_token_ids:
            told["token_ids"] = choice.token_ids
            told["prompt_token_ids"] = self._run.prompts[choice.index // self._run.wanted.n]
        return told
