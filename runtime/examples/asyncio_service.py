"""An AsyncLLM inside a plain asyncio service: lines of JSON over TCP on 127.0.0.1, the standard library beside it.

    python asyncio_service.py BUNDLE --port 8765
    {"prompt": "Once upon a time", "max_tokens": 40}    one line to the service; keep the connection open
    {"text": " there"}   {"text": " was"}   ...         lines back as the text is made
    {"finish_reason": "length"}                         the last one; or {"error": "what is wrong"}

A client that leaves, or sends more, cancels its request between two cycles of the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from typing import Any

from dmtd_runtime import AsyncLLM, DmtdError, RequestError, SamplingParams

MAX_LINE_BYTES = 64 * 1024
MAX_TOKENS = 512
MAX_CLIENTS = 16
READ_SECONDS = 10.0  # for the request line
ANSWER_SECONDS = 120.0  # then the answer ends with finish_reason "deadline"
FIELDS = {"prompt", "max_tokens", "temperature", "seed", "stop"}


class Service:
    """Answers clients of one AsyncLLM; one request a connection."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self.clients: set[asyncio.Task[Any] | None] = set()

    async def on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """From the first byte to the end of a connection."""
        self.clients.add(task := asyncio.current_task())
        try:
            async with asyncio.timeout(READ_SECONDS + ANSWER_SECONDS + 10):
                try:
                    await self._answer(reader, writer)
                except DmtdError as error:
                    await _send(writer, {"error": str(error)})
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            pass  # the client is gone, or stopped reading
        finally:
            writer.close()
            self.clients.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self.clients) > MAX_CLIENTS:
            raise RequestError(f"busy: {MAX_CLIENTS} clients are served already; try again later")
        prompt, params = await _read_request(reader)
        task, left = asyncio.current_task(), asyncio.ensure_future(reader.read(1))  # done when the client leaves
        left.add_done_callback(lambda left: task and not left.cancelled() and task.cancel())
        try:
            async for delta in self._llm.generate(prompt, params, timeout_s=ANSWER_SECONDS):
                if delta.text:
                    await _send(writer, {"text": delta.text})
                if delta.finish_reason:
                    await _send(writer, {"finish_reason": delta.finish_reason})
        finally:
            left.cancel()


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, SamplingParams]:
    try:
        fields = json.loads(await asyncio.wait_for(reader.readline(), READ_SECONDS))
    except (ValueError, RecursionError):  # no JSON, or a line beyond the limit
        fields = None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str) or not set(fields) <= FIELDS:
        raise RequestError(
            f"request: expected one line of JSON, at most {MAX_LINE_BYTES} bytes, with {', '.join(sorted(FIELDS))}"
        )
    prompt = fields.pop("prompt")
    params = SamplingParams(**{"max_tokens": MAX_TOKENS, **fields})
    if params.max_tokens is None or params.max_tokens > MAX_TOKENS:
        raise RequestError(f"got {params.max_tokens}, expected at most {MAX_TOKENS}", param="max_tokens")
    return prompt, params


async def _send(writer: asyncio.StreamWriter, line: dict[str, str]) -> None:
    writer.write(json.dumps(line).encode() + b"\n")
    await writer.drain()


async def serve(bundle: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; open requests then end with finish_reason "abort"."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with AsyncLLM(bundle, max_num_seqs=4) as llm:
        service = Service(llm)
        server = await asyncio.start_server(service.on_client, "127.0.0.1", port, limit=MAX_LINE_BYTES)
        print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await stop.wait()
        server.close()
        await llm.close()
        if service.clients:
            await asyncio.wait(service.clients, timeout=5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a bundle as lines of JSON on 127.0.0.1.")
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8765)
    asyncio.run(serve(**vars(parser.parse_args())))
