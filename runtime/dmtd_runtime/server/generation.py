"""``Run``: what one HTTP request has the engine do, from queue to end.

A request may have several prompts, and each several sequences: they are started together or not at all, read as one stream of
(choice, piece), and end together: with an error, when the client goes, when their time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from dmtd_runtime.async_llm import AsyncLLM, AsyncStream
from dmtd_runtime.errors import BackendError, DmtdError, RequestError
from dmtd_runtime.sampling.structured import PARAM as FORM
from dmtd_runtime.server.errors import RETRY_AFTER, ApiError, draining, of_engine, out_of_time
from dmtd_runtime.server.params import Wanted
from dmtd_runtime.server.served import Served
from dmtd_runtime.serving.outputs import Delta, RequestMetrics, TokenLogprob
from dmtd_runtime.serving.request import Request

Prompts = Sequence[list[int]]


@dataclass(slots=True, kw_only=True)
class Choice:
    """What became of one choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        """Take the next piece."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Run:
    """Start it, read it, and close it whatever happens: closing cancels what has not ended."""

    def __init__(
        self,
        served: Served,
        prompts: Prompts,
        wanted: Wanted,
        *,
        name: str,
        plain: bool,
        priority: int,
        salt: str | None,
    ) -> None:
        self.served, self.prompts, self.wanted = served, prompts, wanted
        self.completion_tokens = 0
        self._llm: AsyncLLM = served.engine(plain=plain)
        self._metrics = served.metrics_of(plain=plain)
        self._names = [f"{name}-{index}" for index in range(len(prompts))]
        self._arrived = time.monotonic()
        self._requests: list[Request] = []
        self._error: ApiError | None = None
        self._is_open = contextlib.ExitStack()
        self._times: dict[tuple[int, int], float] = {}
        self._streams: list[AsyncStream] = [
            self._llm.generate(
                ids,
                wanted.params,
                request_id=request_id,
                timeout_s=served.limits.request_timeout_s,
                priority=priority,
                cache_salt=salt,
                score_from=wanted.score_from,
            )
            for ids, request_id in zip(prompts, self._names, strict=True)
        ]

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.wanted.n

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def cached_tokens(self) -> int:
        """Tokens of prompts that the prefix cache spared; of requests that ended."""
        return sum(min(sequence.cached_tokens for sequence in request.sequences) for request in self._requests)

    async def start(self) -> Self:
        """Queue everything.

        Raises:
            ApiError: it cannot be served, or not now.
        """
        self._is_open.enter_context(self.served.lifecycle.answering(self))
        try:
            for stream in self._streams:
                self._requests.append((await stream.start()).request)
        except DmtdError as error:
            await self.aclose()
            raise self._told(error) from error
        except BaseException:
            await self.aclose()
            raise
        if (patience := self.served.limits.queue_timeout_s) is not None:
            timer = asyncio.get_running_loop().call_later(patience, self._look_at_queue, patience)
            self._is_open.callback(timer.cancel)
        return self

    async def aclose(self) -> None:
        """Cancel what is left; safe to call twice."""
        for stream in self._streams:
            await stream.aclose()
        self._is_open.close()

    def abort(self, error: ApiError) -> None:
        """End it before the next cycle; its reader gets this error."""
        self._error = self._error or error
        for name in self._names:
            self._llm.abort(name)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Pieces as they come, each with the choice that it belongs to.

        Raises:
            ApiError: the request ended before its end.
        """
        try:
            async for place, delta in _merged(self._streams):
                if delta.finish_reason == "deadline":
                    raise out_of_time(self.served.limits.request_timeout_s or 0.0)
                if delta.finish_reason == "abort":
                    raise self._error or draining()
                self._observe(place, delta)
                self.completion_tokens += len(delta.token_ids) * self.wanted.copies
                first = place * self.wanted.n + delta.index
                for choice in range(first, first + self.wanted.copies):
                    yield choice, delta
            self._observe_ends()
        except DmtdError as error:
            raise self._told(error) from error

    def prompt_logprobs(self, place: int) -> list[TokenLogprob | None]:
        """Those of one prompt's tokens, from its first piece on."""
        return self._requests[place].prompt_logprobs() or []

    def steps(self) -> RequestMetrics:
        """The decoding's steps of all prompts together, once they have ended."""
        each = [request.result().metrics for request in self._requests]
        return RequestMetrics(
            full_passes=sum(one.full_passes for one in each),
            late_steps=sum(one.late_steps for one in each),
            dropped_tokens=sum(one.dropped_tokens for one in each),
        )

    async def choices(self) -> list[Choice]:
        """All choices at their ends."""
        choices = [Choice(index=index) for index in range(self.num_choices)]
        async for index, delta in self:
            choices[index].add(delta)
        return choices

    def _told(self, error: DmtdError) -> ApiError:
        if isinstance(error, BackendError):
            self.served.lifecycle.engine_died()
        if isinstance(error, RequestError) and error.param in (FORM, "score_from"):
            param = self.wanted.form if error.param == FORM else "dmtd.score_from"
            return ApiError(400, f"{param}: {error.problem}", param=param)
        told = of_engine(error)
        if told.status == 429:
            self._metrics.rejected("queue_full")
        if isinstance(error, RequestError) and error.param == "request_id":
            told = ApiError(409, str(error), param="request_id", headers={"x-should-retry": "false"})
        return told

    def _look_at_queue(self, patience: float) -> None:
        if any(sequence.started is None for request in self._requests for sequence in request.sequences):
            self._metrics.rejected("queue_timeout")
            problem = f"the request waited for {patience:g} seconds without its turn; try again later"
            self.abort(ApiError(429, problem, code="queue_timeout", headers=RETRY_AFTER))

    def _observe(self, place: int, delta: Delta) -> None:
        if not delta.token_ids:
            return
        before, count = self._times.get((place, delta.index)), len(delta.token_ids)
        if before is None:
            self._metrics.first_token(time.monotonic() - self._arrived)
            before, count = self._requests[place].first_token_s or 0.0, count - 1
        if count:
            self._metrics.tokens(max(delta.at_s - before, 0.0) / count, count)
        self._times[place, delta.index] = delta.at_s

    def _observe_ends(self) -> None:
        seconds = time.monotonic() - self._arrived
        for request in self._requests:
            self._metrics.ended(request.result(), seconds)


async def _merged(streams: Sequence[AsyncStream]) -> AsyncIterator[tuple[int, Delta]]:
    """The pieces of several streams, in the order in which they come."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return

    async def following(place: int) -> tuple[int, Delta | None]:
        return place, await anext(streams[place], None)

    waiting = {asyncio.create_task(following(place)) for place in range(len(streams))}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for place, piece in [task.result() for task in done]:
                if piece is not None:
                    waiting.add(asyncio.create_task(following(place)))
                    yield place, piece
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
