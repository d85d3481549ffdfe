"""The outermost layer: every request gets its name, is let in or refused, and leaves one line in the log.

In order: request id; the state of the server; the key; the content type; the whole body, bounded in bytes and time. The
application behind it sees a body that is already here. Logs tell methods, paths, statuses and times, never a key, a prompt or
an answer; ``log_requests`` adds bodies of requests.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmtd_runtime.server.auth import FREE_PATHS, Keys
from dmtd_runtime.server.errors import ApiError
from dmtd_runtime.server.lifecycle import Lifecycle
from dmtd_runtime.server.options import Limits
from dmtd_runtime.server.streaming import ClientGoneError, answer

logger = logging.getLogger("dmtd.server")
access = logging.getLogger("dmtd.server.access")

ALWAYS = FREE_PATHS | {"/metrics", "/version"}
"""Answered in every state."""
_NAME = re.compile(rb"[\x21-\x7e]{1,128}")
_CLOSE = {"Connection": "close"}
_LINGER = 4
"""A body of so many times the limit is read to its end before it is refused."""


class Front:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle, keys: Keys, limits: Limits, log_requests: bool) -> None:
        self._app, self._lifecycle, self._keys, self._limits = app, lifecycle, keys, limits
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        name = headers.get(b"x-request-id", b"")
        request_id = name.decode() if _NAME.fullmatch(name) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begin, told = time.perf_counter(), _Sent(send, request_id)
        try:
            body = await self._admit(scope, headers, receive)
            if self._log_requests and body:
                access.info(
                    "request %s: %s", request_id, body.decode(errors="replace"), extra={"request_id": request_id}
                )
            await self._app(scope, _replay(body, receive), told)
        except ApiError as error:
            await answer(error.body(), error.status, error.headers)(scope, receive, told)
        except (ClientGoneError, asyncio.CancelledError) as gone:
            told.status = 499  # nginx's word for it
            if isinstance(gone, asyncio.CancelledError):
                raise
        except Exception:  # answered already (``app``), unless an answer was under way
            logger.exception("a bug; please report it", extra={"request_id": request_id})
            if told.status != 500:
                raise
        finally:
            self._log(scope, request_id, told.status, time.perf_counter() - begin)

    async def _admit(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body of a request that may come in."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in ALWAYS:
            self._lifecycle.refuse_unless_ready()
        self._keys.check(path, headers.get(b"authorization"))
        if scope["method"] != "POST":
            return b""
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "expected a JSON body with the header Content-Type: application/json", headers=_CLOSE)
        length = headers.get(b"content-length", b"")
        most = self._limits.max_body_bytes
        announced = int(length[:20]) if length.isdigit() else 0
        if announced > most and (b"expect" in headers or announced > _LINGER * most):
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await self._read(receive)
        except TimeoutError:
            seconds = self._limits.body_timeout_s
            raise ApiError(408, f"the body did not come within {seconds:g} seconds", headers=_CLOSE) from None

    async def _read(self, receive: Receive) -> bytes:
        """The body. One that is too large is read on for a while, and dropped: a client that writes would not see the answer."""
        body, length, most = bytearray(), 0, self._limits.max_body_bytes
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            piece, more = message.get("body", b""), message.get("more_body", False)
            length += len(piece)
            if length <= most:
                body += piece
            elif not more or length > _LINGER * most:
                raise self._too_large()
            if not more:
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"expected a body of at most {self._limits.max_body_bytes} bytes", headers=_CLOSE)

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        path = scope["path"]
        level = logging.DEBUG if path in ALWAYS else logging.INFO
        if access.isEnabledFor(level):
            shown = "".join(letter if letter.isprintable() else "?" for letter in path[:200])
            facts = {"request_id": request_id, "method": scope["method"], "path": shown, "status": status}
            facts |= {"duration_ms": round(seconds * 1e3, 1), "client": (scope.get("client") or ("-",))[0]}
            line = "%(method)s %(path)s %(status)s in %(duration_ms)s ms"
            access.log(level, line, facts, extra=facts)


class _Sent:
    """``send`` that adds the request's name and notes the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._name, self.status = send, request_id.encode(), 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self._name)]}
        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` that gives the body once, and then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
