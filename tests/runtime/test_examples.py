"""The examples run as they stand: the batch script, and the asyncio service over real sockets."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from runtime_support import TinyBundle, held

from dmtd_runtime import LLM, AsyncLLM, CompletionOutput, SamplingParams
from dmtd_runtime.serving import sequence

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "runtime" / "examples"
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}


@pytest.fixture(scope="module")
def service_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("asyncio_service", EXAMPLES / "asyncio_service.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Client:
    """One connection to the service."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def ask(self, request: dict[str, Any] | bytes) -> None:
        line = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
        self.writer.write(line)
        await self.writer.drain()

    async def line(self) -> dict[str, str] | None:
        """The next line, None at the end of the connection."""
        raw = await asyncio.wait_for(self.reader.readline(), 60)
        answer: dict[str, str] | None = json.loads(raw) if raw else None
        return answer

    async def rest(self) -> list[dict[str, str]]:
        lines = []
        while (line := await self.line()) is not None:
            lines.append(line)
        return lines


@asynccontextmanager
async def serving(llm: AsyncLLM, module: ModuleType) -> AsyncIterator[int]:
    service = module.Service(llm)
    server = await asyncio.start_server(service.on_client, "127.0.0.1", 0, limit=module.MAX_LINE_BYTES)
    async with server:
        yield server.sockets[0].getsockname()[1]
        server.close()
        await llm.close()
        if service.clients:
            await asyncio.wait(service.clients, timeout=60)
    assert service.clients == set()


@pytest.fixture
def llm(bundle: TinyBundle) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(bundle.directory, max_num_seqs=1, threads=1)
    yield llm
    asyncio.run(llm.close())


def whole(llm: AsyncLLM, prompt: str, max_tokens: int) -> CompletionOutput:
    """The greedy answer in one piece."""

    async def main() -> CompletionOutput:
        output = await llm.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens)).result()
        return output.outputs[0]

    return asyncio.run(main())


def text_of(lines: list[dict[str, str]]) -> str:
    return "".join(line.get("text", "") for line in lines)


LONG = {"prompt": "a", "temperature": 0, "max_tokens": 240}
GREEDY = {"temperature": 0, "max_tokens": 20, "prompt": "Hello"}


def test_two_clients_at_once_get_their_own_text(llm: AsyncLLM, service_module: ModuleType) -> None:
    want = {prompt: whole(llm, prompt, 20) for prompt in ("Hello", "Good night")}

    async def main() -> None:
        async with serving(llm, service_module) as port, Client(port) as one, Client(port) as two:
            await one.ask(GREEDY)
            await two.ask({**GREEDY, "prompt": "Good night"})
            answers = await asyncio.gather(one.rest(), two.rest())
        for prompt, lines in zip(("Hello", "Good night"), answers, strict=True):
            assert text_of(lines) == want[prompt].text
            assert lines[-1] == {"finish_reason": want[prompt].finish_reason}

    asyncio.run(main())


def test_a_client_that_leaves_frees_its_slot(llm: AsyncLLM, service_module: ModuleType) -> None:
    assert len(whole(llm, "a", 240).token_ids) > 200, "the test needs a long answer"
    steps = llm.stats.full_passes + llm.stats.late_steps

    async def main() -> None:
        async with serving(llm, service_module) as port:
            with held(llm, after=20) as hold:
                async with Client(port) as leaver:
                    await leaver.ask(LONG)
                    assert "text" in (await leaver.line() or {}), "the first piece comes while the rest is not made yet"
                    [left] = llm._requests
                    # Meanwhile another one waits for the only slot.
                    stays = await Client(port).__aenter__()
                    await stays.ask({**GREEDY, "max_tokens": 2})
                await wait_until(lambda: left not in llm._requests)
                hold.release()
                lines = await stays.rest()
            assert lines[-1] == {"finish_reason": "length"}
            stays.writer.close()
            await wait_until(lambda: not llm._requests)
        assert llm.stats.full_passes + llm.stats.late_steps - steps < 150, "it ran on for nobody"

    asyncio.run(main())


async def wait_until(condition: Any) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("request_line", "words"),
    [
        (b"not json\n", "expected one line of JSON"),
        (b"\n", "expected one line of JSON"),
        (b"[1]\n", "expected one line of JSON"),
        (b'{"prompt": 3}\n', "expected one line of JSON"),
        (b'{"prompt": "a", "sudo": 1}\n', "expected one line of JSON"),
        (b"[" * 60_000 + b"\n", "expected one line of JSON"),
        (b'{"prompt": "' + b"a" * 70_000 + b'"}\n', "at most 65536 bytes"),
        (b'{"prompt": "' + b"a" * 1000 + b'"}\n', "prompt: got 1000 tokens, expected at most 255"),
        (b'{"prompt": ""}\n', "prompt: got no tokens"),
        (b'{"prompt": "a", "max_tokens": 0}\n', "max_tokens: got 0"),
        (b'{"prompt": "a", "max_tokens": 513}\n', "max_tokens: got 513, expected at most 512"),
        (b'{"prompt": "a", "max_tokens": null}\n', "max_tokens: got None"),
        (b'{"prompt": "a", "temperature": "hot"}\n', "temperature: got 'hot'"),
    ],
)
def test_bad_requests_get_one_line(llm: AsyncLLM, service_module: ModuleType, request_line: bytes, words: str) -> None:
    async def main() -> None:
        async with serving(llm, service_module) as port, Client(port) as client:
            await client.ask(request_line)
            [answer] = await client.rest()
            assert words in answer["error"]
            async with Client(port) as next_one:
                await next_one.ask({**GREEDY, "max_tokens": 1})
                assert (await next_one.rest())[-1] == {"finish_reason": "length"}

    asyncio.run(main())


def test_limits_on_clients_and_time(llm: AsyncLLM, service_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(ahead=0.0, monotonic=lambda: time.monotonic() + clock.ahead)
    monkeypatch.setattr(sequence, "time", clock)
    monkeypatch.setattr(service_module, "MAX_CLIENTS", 1)

    async def main() -> None:
        async with serving(llm, service_module) as port:
            async with Client(port) as first, Client(port) as second:
                with held(llm, after=8):
                    await first.ask(LONG)
                    await first.line()
                    await second.ask(GREEDY)
                    assert "busy" in (await second.rest())[0]["error"]
                    clock.ahead = 2 * service_module.ANSWER_SECONDS
                assert (await first.rest())[-1] == {"finish_reason": "deadline"}
            monkeypatch.setattr(service_module, "READ_SECONDS", 0.1)
            async with Client(port) as silent:
                assert await silent.rest() == []

    asyncio.run(main())


def test_closing_the_service_ends_its_streams(llm: AsyncLLM, service_module: ModuleType) -> None:
    async def main() -> None:
        with held(llm, after=8):
            async with serving(llm, service_module) as port:
                client = await Client(port).__aenter__()
                await client.ask(LONG)
                await client.line()
        assert (await client.rest())[-1] == {"finish_reason": "abort"}
        client.writer.close()

    asyncio.run(main())


def test_the_service_as_a_program(bundle: TinyBundle) -> None:
    command = [sys.executable, str(EXAMPLES / "asyncio_service.py"), str(bundle.directory), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRON) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", process.stdout.readline())
            assert found, process.stderr.read() if process.stderr else ""

            async def talk() -> list[list[dict[str, str]]]:
                async with Client(int(found[1])) as one, Client(int(found[1])) as two:
                    await one.ask(GREEDY)
                    await two.ask(GREEDY)
                    return list(await asyncio.gather(one.rest(), two.rest()))

            first, second = asyncio.run(talk())
            assert text_of(first) == text_of(second) != ""
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")


def test_the_batch_script(bundle: TinyBundle) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "batch.py"), str(bundle.directory)],
        input="Hello\n\nGood night\n",
        capture_output=True,
        text=True,
        env=ENVIRON,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Hello", "Good night"]
    with LLM(bundle.directory, threads=1) as llm:
        want = llm.generate(["Hello", "Good night"], SamplingParams(temperature=0, max_tokens=64))
    assert [answer["text"] for answer in answers] == [output.outputs[0].text for output in want]


def test_the_readmes_python_runs(bundle: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of runtime/README.md in turn, in one namespace, over a directory that holds a bundle."""
    (tmp_path / "bundle").symlink_to(bundle.directory)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "runtime" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
