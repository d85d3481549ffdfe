"""One client's connection: heads must come in time, answers must be read, and there may be so many connections."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dmtd_runtime.server.options import Limits

logger = logging.getLogger("dmtd.server")

_MAX_WAITING_BYTES = 64 << 10
"""Of requests behind the one being answered; with more of them the connection is not read on until it is their turn."""
_LOOKS = 8
"""So often within ``write_timeout_s`` it is seen whether a client reads."""


class Connection(H11Protocol):
    """uvicorn's, with ``limits``. Dropping it ends the request that is being answered, as if the client had gone."""

    limits = Limits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or drop it."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            logger.warning("%d connections are open: a new one is dropped", len(self.connections) - 1)
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    # What the client sends

    def data_received(self, data: bytes) -> None:
        """Read on; from the first byte of a head, it has so many seconds."""
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        super().data_received(data)

    def handle_events(self) -> None:
        """After each: a head that is whole needs no timer, and requests that wait behind another hide no client's end.

        uvicorn reads no further while bytes of the next request wait, and would see the client go when its answer is written.
        """
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_head_timer()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _MAX_WAITING_BYTES:
            self.flow.resume_reading()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._drop)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # What it reads

    def pause_writing(self) -> None:
        """The buffer is full."""
        super().pause_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        """Nothing is written any more; what the client has not read yet is in the buffer."""
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self) -> None:
        self._stop_read_timer()
        if unread := self.transport.get_write_buffer_size():
            self._look_again(unread, self.loop.time())

    def _look_again(self, unread: int, since: float) -> None:
        self._read_timer = self.loop.call_later(self.limits.write_timeout_s / _LOOKS, self._look, unread, since)

    def _look(self, unread: int, since: float) -> None:
        """Drop a client that has read nothing of ``unread`` bytes since then."""
        self._read_timer = None
        left, now = self.transport.get_write_buffer_size(), self.loop.time()
        if not left or not (self.flow.write_paused or self.cycle.response_complete):
            return
        if left < unread:
            self._look_again(left, now)
        elif now - since < self.limits.write_timeout_s:
            self._look_again(unread, since)
        else:
            logger.info("a client read nothing for %g s: its connection is dropped", self.limits.write_timeout_s)
            self._drop()

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _drop(self) -> None:
        self._stop_head_timer()
        self.transport.abort()
