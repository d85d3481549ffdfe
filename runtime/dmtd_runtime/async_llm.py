"""``AsyncLLM``: a bundle opened for an event loop.

    async with AsyncLLM("bundle", max_num_seqs=8) as llm:
        async for delta in llm.generate("Hello", SamplingParams(max_tokens=20)):
            print(delta.text, end="")

Opening blocks, as files are read and checked: open before the loop serves anybody, or with ``asyncio.to_thread``. After that
nothing blocks it: the worker's thread notes who has been told something, and wakes an event loop once a step. No stream has a
thread, and nothing is polled.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.errors import AbortedError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.serving.outputs import Delta, RequestOutput
from dmtd_runtime.serving.request import Request
from dmtd_runtime.serving.service import Service
from dmtd_runtime.text.prompt import Message, Prompt

logger = logging.getLogger("dmtd.llm")

SERVICE_NUM_SEQS = 8  # where a pass over T still costs little more than one for a single sequence

LONG_PROMPT = 4000
"""Characters or token ids that are checked in a thread; what is shorter takes less than about 3 ms of the event loop."""


class AsyncLLM(Service):
    __doc__ = Service.__doc__

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every request, stop the worker and free its memory. Safe to call twice."""
        await asyncio.to_thread(self._close)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        score_from: int | None = None,
    ) -> AsyncStream:
        """Complete one prompt (text, or token ids) piece by piece. Nothing happens until the stream is started or read.

        Args:
            prompt: a string or a list of token ids.
            params: how to choose; None: the bundle's generation_config.json.
            request_id: names it for :meth:`abort`.
            timeout_s: a request not done by then ends with ``finish_reason`` "deadline" and what it has.
            priority: of those that wait, lower goes first.
            cache_salt: cached prefixes are shared among requests of the same salt alone.
            score_from: the prompt's tokens from this place on are read as a reply in cycles, which ``prompt_logprobs`` then
                scores; None: all of it as a prompt.

        Returns:
            A stream, which raises what cannot be served (RequestError, QueueFullError) when it is started.
        """

        def request() -> Request:
            return self._request(
                prompt,
                params,
                request_id=request_id,
                timeout_s=timeout_s,
                priority=priority,
                cache_salt=cache_salt,
                score_from=score_from,
            )

        return AsyncStream(
            self, request, is_long=_has_form(params) or (hasattr(prompt, "__len__") and len(prompt) > LONG_PROMPT)
        )

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncStream:
        """Answer a conversation piece by piece; see :meth:`generate` and :meth:`render_chat`."""

        def request() -> Request:
            return self._request(
                self.render_chat(messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs),
                params,
                request_id=request_id,
                timeout_s=timeout_s,
                priority=priority,
                cache_salt=cache_salt,
                from_template=True,
            )

        return AsyncStream(
            self, request, is_long=_has_form(params) or len(repr((messages, tools, documents))) > LONG_PROMPT
        )

    def _usual_num_seqs(self, manifest: Manifest) -> int:
        packed = [graph.slots for graph in manifest.graphs if graph.dialect == contract.ONNXRUNTIME]
        return min(SERVICE_NUM_SEQS, max(packed, default=SERVICE_NUM_SEQS))

    def _after_step(self) -> Callable[[], None]:
        self._loops = _EventLoops()
        return self._loops.flush

    def _start_for(self, reader: _Reader, request: Request) -> None:
        """Queue a request whose reader waits in the running event loop."""
        request.notify = self._loops.teller(reader)
        self._start([request])


def _has_form(params: object) -> bool:
    """Whether a grammar is to be compiled, which may take long."""
    return isinstance(params, SamplingParams) and params.structured_outputs is not None


class AsyncStream(AsyncIterator[Delta]):
    """Pieces of one request, for one task.

    Closing it, leaving its ``async with`` block, cancelling the task that waits for it or dropping it cancels the request before
    the next cycle. A piece is all that a sequence has made since its last one: a slow reader gets fewer and larger ones.
    """

    def __init__(self, llm: AsyncLLM, make: Callable[[], Request], *, is_long: bool) -> None:
        self._llm, self._make, self._is_long = llm, make, is_long
        self._request: Request | None = None
        self._reader = _Reader()
        self._close: Callable[[], Any] = lambda: None
        self._is_closed = False

    @property
    def request_id(self) -> str | None:
        """Its name for :meth:`AsyncLLM.abort`; None before it is started."""
        return self._request.request_id if self._request else None

    @property
    def request(self) -> Request:
        """What was started."""
        assert self._request is not None, "the stream has not started"
        return self._request

    async def start(self) -> Self:
        """Check and queue the request, once; the first piece that is asked for does it too. Errors as in LLM.generate."""
        await self._started()
        return self

    async def __anext__(self) -> Delta:
        if self._is_closed and self._request is None:
            raise StopAsyncIteration
        try:
            request = await self._started()
            while True:
                self._reader.bell.clear()
                finished = request.finished  # before the last pieces are taken
                if (delta := request.take()) is not None:
                    return delta
                if finished:
                    request.result()  # raises the error that ended it
                    raise StopAsyncIteration
                await self._reader.bell.wait()
        except BaseException:
            await self.aclose()
            raise

    async def result(self) -> RequestOutput:
        """Wait for the end, and give the whole output with its metrics, pieces taken before included."""
        request = await self._started()
        async for _ in self:
            pass
        return request.result()

    async def aclose(self) -> None:
        """Cancel what is left of the request."""
        self._is_closed = True
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _started(self) -> Request:
        if self._request is None:
            if self._is_closed:
                raise AbortedError("the stream was closed before it was started; ask again")
            request = await asyncio.to_thread(self._make) if self._is_long else self._make()
            llm = self._llm
            self._reader.forget = lambda: llm._forget([request])
            llm._start_for(self._reader, request)
            self._request, self._close = request, weakref.finalize(self, self._reader.forget)
        return self._request


class _Reader:
    """A task that waits for pieces of one request: ``bell`` rings in its event loop when there are some."""

    def __init__(self) -> None:
        self.bell = asyncio.Event()
        self.is_told = False  # by the worker's thread, and the bell has not rung yet
        self.is_new = True  # it was never told
        self.forget: Callable[[], None] = lambda: None


class _EventLoop:
    """The readers of one event loop. The worker's thread tells and flushes; the loop rings.

    No lock: each side writes what the other reads only after that for which it does so is in place.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._told: deque[_Reader] = deque()
        self._is_called = False

    def tell(self, reader: _Reader) -> None:
        if not reader.is_told:
            # First tokens go first: behind seven others they would wait for all that those write.
            (self._told.appendleft if reader.is_new else self._told.append)(reader)
            reader.is_told, reader.is_new = True, False

    def flush(self) -> None:
        """Let the loop ring, unless it is about to."""
        if not self._told:
            return
        try:
            if not self._is_called or self.loop.is_closed():
                self._is_called = True
                self.loop.call_soon_threadsafe(self._ring)
        except RuntimeError:
            logger.warning("an event loop was closed in the middle of %d streams: they end", len(self._told))
            while self._told:
                self._told.popleft().forget()

    def _ring(self) -> None:
        self._is_called = False
        while self._told:
            reader = self._told.popleft()
            reader.is_told = False
            reader.bell.set()


class _EventLoops:
    """All event loops that read streams of one worker; closed ones are dropped."""

    def __init__(self) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, _EventLoop] = {}

    def teller(self, reader: _Reader) -> Callable[[], None]:
        """What lets the worker's thread tell a reader in the running event loop."""
        loop = asyncio.get_running_loop()
        found = self._loops.setdefault(loop, _EventLoop(loop))
        return lambda: found.tell(reader)

    def flush(self) -> None:
        for each in list(self._loops.values()):
            each.flush()
            if each.loop.is_closed():
                self._loops.pop(each.loop, None)
