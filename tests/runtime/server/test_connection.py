"""Connections of clients that do not read what they asked for: real sockets, with buffers too small for the answer."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator

import pytest
from runtime_support import TinyBundles, held, wait_until
from server_support import Running, running

from dmtd_runtime.server.options import Limits, ServerOptions

pytestmark = pytest.mark.timeout(300)

SMALL = 4096
PROMPT_BYTES = 64 << 10


@pytest.fixture(scope="module")
def server(tiny: TinyBundles) -> Iterator[Running]:
    with running(tiny.get().directory, ServerOptions(), limits=Limits(write_timeout_s=2)) as server:
        for each in server.server.servers[0].sockets:  # connections have what their listener has
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        yield server


def request(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


def unread(server: Running, body: dict[str, object]) -> socket.socket:
    """A client that asks and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    connection.connect(server.address)
    connection.sendall(request(body))
    return connection


def is_closed(server: Running) -> bool:
    """Whether no client is there, and all that it asked for is cancelled."""
    return not server.server.server_state.connections and server.server.home.lifecycle.num_open == 0


def is_idle(server: Running) -> bool:
    counts = server.served.llm.snapshot()
    return counts.running == counts.waiting == 0 == server.server.home.lifecycle.num_open


def test_a_stream_that_nobody_reads_frees_its_slot(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    body = {
        "prompt": [5],
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
        "n": 4,
        "temperature": 1,
        "logprobs": 20,
    }
    before = server.served.llm.snapshot().generation_tokens
    with caplog.at_level(logging.DEBUG, "dmtd.server"):
        # The worker stands still after 60 steps, 200 kB of events, until the client is dropped: then four slots are free.
        with held(server.served.llm, after=60, until=lambda: is_closed(server)) as hold, unread(server, body):  # type: ignore[arg-type]
            hold.wait()
            wait_until(lambda: is_closed(server))
        wait_until(lambda: is_idle(server))
    assert 100 < server.served.llm.snapshot().generation_tokens - before <= 4 * 61
    told = [record for record in caplog.records if "read nothing for 2 s" in record.getMessage()]
    assert len(told) == 1 and all(record.levelno <= logging.INFO and not record.exc_info for record in caplog.records)


@pytest.mark.parametrize("num_choices", [1, 4])
def test_a_whole_answer_that_nobody_reads_does_not_stay(server: Running, num_choices: int) -> None:
    """In a buffer that is full, and in one that is not."""
    state = server.server.server_state
    body = {"prompt": [5], "max_tokens": 60, "ignore_eos": True, "n": num_choices, "temperature": 1, "logprobs": 20}
    before = state.total_requests
    with unread(server, body):
        wait_until(lambda: state.total_requests > before and not state.connections)


def test_who_reads_slowly_gets_everything(server: Running) -> None:
    body = {
        "prompt": [5],
        "max_tokens": 60,
        "ignore_eos": True,
        "n": 4,
        "temperature": 1,
        "logprobs": 20,
        "stream": True,
    }
    told = b""
    with unread(server, body) as connection:
        while not told.endswith(b"0\r\n\r\n"):
            told += (more := connection.recv(SMALL))
            assert more
    assert len(told) > PROMPT_BYTES and b"data: [DONE]" in told


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_is_seen_behind_requests_that_wait(server: Running, stream: bool) -> None:
    body = {"prompt": [5], "max_tokens": 200, "ignore_eos": True, "temperature": 1, "stream": stream}
    before = server.served.llm.snapshot().generation_tokens
    with held(server.served.llm, after=5, until=lambda: is_closed(server)) as hold:  # type: ignore[arg-type]
        with server.raw(request(body) + request(body)) as connection:
            hold.wait()
            connection.sendall(request(body)[:70])  # in the middle of a third
        wait_until(lambda: is_closed(server))
    wait_until(lambda: is_idle(server))
    assert server.served.llm.snapshot().generation_tokens - before <= 6
