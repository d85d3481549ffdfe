"""Answers on the wire: JSON, and server-sent events that end when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dmtd_runtime.server.errors import ApiError

logger = logging.getLogger("dmtd.server")

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair, which a request may have carried, stays an escape."""
    try:
        return _encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(json_bytes(value), status, headers=headers, media_type="application/json")


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json_bytes(value) + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client goes.

    Raises:
        ClientGoneError: it went.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class EventStream(Response):
    """Server-sent events from ``events``: an error in it is the last of them. ``close`` is called whatever happens.

    No more than the transport's buffer is kept for a reader: nothing is made while it is full.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        close: Callable[[], Awaitable[None]],
        error_event: Callable[[ApiError], bytes] = lambda error: event(error.body()) + DONE,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=_EVENT_HEADERS)
        del self.headers["content-length"]
        self._events, self._close, self._error_event = events, close, error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write events until they end, or nobody reads them."""

        async def write_all() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for each in self._told():
                await send({"type": "http.response.body", "body": each, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, write_all())
        finally:
            await self._close()

    async def _told(self) -> AsyncIterator[bytes]:
        try:
            async for each in self._events:
                yield each
        except ApiError as error:
            yield self._error_event(error)
        except Exception:
            logger.exception("a stream failed")
            yield self._error_event(ApiError(500, "internal error", code="internal_error"))


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
