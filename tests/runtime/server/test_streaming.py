"""Answers on the wire, over a ``send`` and a ``receive`` that tests hold in their hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dmtd_runtime.server.errors import ApiError
from dmtd_runtime.server.streaming import ClientGoneError, EventStream, event, json_bytes


async def endless(made: list[int]) -> AsyncIterator[bytes]:
    for number in range(1 << 30):
        made.append(number)
        yield event({"n": number})
        await asyncio.sleep(0)


def test_nothing_is_made_while_the_buffer_is_full(caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []
    told: list[str] = []
    blocked = asyncio.Event()

    async def close() -> None:
        told.append("closed")

    async def send(message: Any) -> None:
        told.append("sent")
        if len(made) == 5:  # the transport's buffer is full and stays so
            blocked.set()
            await asyncio.Event().wait()

    async def receive() -> Any:
        await blocked.wait()
        return {"type": "http.disconnect"}  # the connection dropped it (``connection.py``)

    with pytest.raises(ClientGoneError), caplog.at_level("DEBUG"):
        asyncio.run(EventStream(endless(made), close=close)({"type": "http"}, receive, send))
    assert told == ["sent"] * 6 + ["closed"] and len(made) == 5  # the head and five events; nothing is made for nobody
    assert [record for record in caplog.records if record.name != "asyncio"] == []


def test_a_client_that_goes_ends_the_stream() -> None:
    made, closed = [], []

    async def close() -> None:
        closed.append(True)

    async def send(message: Any) -> None:
        pass

    async def receive() -> Any:
        while len(made) < 3:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    stream = EventStream(endless(made), close=close)
    with pytest.raises(ClientGoneError):
        asyncio.run(stream({"type": "http"}, receive, send))
    assert closed == [True]


@pytest.mark.parametrize(
    ("error", "code"), [(ApiError(503, "no", code="gone"), b'"gone"'), (ValueError("secret"), b"internal")]
)
def test_an_error_in_the_middle_is_the_last_event(error: Exception, code: bytes) -> None:
    sent: list[bytes] = []

    async def events() -> AsyncIterator[bytes]:
        yield event({"n": 1})
        raise error

    async def close() -> None:
        pass

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(EventStream(events(), close=close)({"type": "http"}, receive, send))
    text = b"".join(sent)
    assert code in text and text.endswith(b"data: [DONE]\n\n") and b"secret" not in text


def test_json_that_utf8_cannot_write_is_escaped() -> None:
    assert json_bytes({"a": "é"}) == '{"a":"é"}'.encode()
    assert json_bytes({"a": "\ud800"}) == b'{"a":"\\ud800"}'
