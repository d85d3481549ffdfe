"""Loading, ready, draining, dead: what the server answers in each, and how it ends.

SIGTERM or Ctrl-C begins the drain: readiness is 503 at once and new requests are refused, liveness stays 200, running requests
have ``shutdown_timeout_s`` to end; what is left then is aborted with its reason, and the process exits with 0. A second signal
ends it now. An engine that died ends the process too, with 1, once all open requests have their error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

from dmtd_errors.words import counted
from dmtd_runtime.server.errors import ApiError, draining, engine_failed, loading

logger = logging.getLogger("dmtd.server")

State = Literal["loading", "ready", "draining", "dead"]
LAST_WORDS_S = 5.0
"""For aborted requests to tell their clients so."""


class Open(Protocol):
    """A request that is being answered."""

    def abort(self, error: ApiError) -> None:
        """End it before the next cycle; its client gets this error."""


class Lifecycle:
    """One server's; all methods are for its event loop's thread. ``ended`` is called once, when the server should exit."""

    def __init__(self, *, shutdown_timeout_s: float, ended: Callable[[], None] = lambda: None) -> None:
        self.state: State = "loading"
        self.ended = ended
        self._timeout_s = shutdown_timeout_s
        self._open: set[Open] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return len(self._open)

    def loaded(self) -> None:
        """The engine is open."""
        if self.state == "loading":
            self.state = "ready"

    def refuse_unless_ready(self) -> None:
        """Raise the ApiError of the moment."""
        if self.state == "loading":
            raise loading()
        if self.state == "draining":
            raise draining()
        if self.state == "dead":
            raise engine_failed()

    @contextlib.contextmanager
    def answering(self, request: Open) -> Iterator[None]:
        """While a request is being answered."""
        self._open.add(request)
        try:
            yield
        finally:
            self._open.discard(request)

    def drain(self) -> None:
        """Begin to end."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
            logger.info("draining: %s, %g s to end", counted(len(self._open), "request"), self._timeout_s)
            self._task = asyncio.get_running_loop().create_task(self._end(self._timeout_s, draining()))

    def engine_died(self) -> None:
        """End, as there is nothing to answer with."""
        if self.state != "dead":
            self.state = "dead"
            logger.error("the engine failed: this server ends with exit code 1")
            self._task = asyncio.get_running_loop().create_task(self._end(LAST_WORDS_S, engine_failed()))

    async def _end(self, seconds: float, error: ApiError) -> None:
        await self._wait(seconds)
        if self._open:
            logger.warning("aborting %d requests", len(self._open))
            for request in list(self._open):
                request.abort(error)
            await self._wait(LAST_WORDS_S)
        self.ended()

    async def _wait(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while self._open and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
