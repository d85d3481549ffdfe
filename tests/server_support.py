"""A real server over a tiny bundle, in a thread of the test's process: its clients use sockets, the test sees its inside."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.server.options import Limits, ServerOptions
from dmtd_runtime.server.run import Server, Settings
from dmtd_runtime.server.served import Served
from dmtd_runtime.serving.options import ServingOptions

HERMES = """{%- if tools %}<|im_start|>system
You may call: {% for tool in tools %}{{ tool | tojson }}{% endfor %}
Answer <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] -%}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Ulm", "Bonn"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
HI = [{"role": "user", "content": "Hi"}]


@dataclass(slots=True)
class Running:
    """A server that answers."""

    server: Server
    url: str
    thread: threading.Thread
    codes: list[int]
    """The exit code, once it has ended."""

    @property
    def served(self) -> Served:
        return self.server.home.served

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.split("/")[2].rpartition(":")
        return host, int(port)

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(f"{self.root}{path}", content=json.dumps(body), headers=headers, timeout=120, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.root}{path}", timeout=120, **options)

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection that has sent these bytes."""
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(data)
        return connection


@contextmanager
def running(bundle: Path, options: ServerOptions = ServerOptions(), **groups: Any) -> Iterator[Running]:
    """``groups``: ``limits``, ``backend``, ``serving``."""
    groups.setdefault("backend", BackendOptions(threads=1))
    groups.setdefault("limits", Limits())
    groups.setdefault("serving", ServingOptions(max_num_queued_reqs=256))
    ready, told, codes = threading.Event(), [], []

    def announce(url: str, seconds: float) -> None:
        told.append(url)
        ready.set()

    server = Server(Settings(bundle=bundle, options=replace(options, port=0), **groups), announce)

    def run() -> None:
        try:
            codes.append(server.run_to_end())
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(120) and told, "the server never came up"
    try:
        yield Running(server, told[0], thread, codes)
    finally:
        if server.loop is not None and not server.loop.is_closed():
            with suppress(RuntimeError):  # it ended by itself
                server.loop.call_soon_threadsafe(server.home.lifecycle.drain)
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


def chunks(response: httpx.Response) -> list[Any]:
    """The data of server-sent events, [DONE] as text."""
    told = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in told]


async def call(
    app: Any, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """One request straight to an ASGI application."""
    given = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    sent: list[Any] = []
    given_body, over = False, asyncio.Event()

    async def receive() -> Any:
        nonlocal given_body
        if not given_body:
            given_body = True
            return {"type": "http.request", "body": body, "more_body": False}
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    over.set()
    status = next(each["status"] for each in sent if each["type"] == "http.response.start")
    return status, b"".join(each.get("body", b"") for each in sent if each["type"] == "http.response.body")
