"""Requests that no client meant: none crashes the server, none is a 5xx, none keeps a slot."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from runtime_support import TinyBundles
from server_support import HI, Running, call, running

from dmtd_runtime.server.fields import TABLE
from dmtd_runtime.server.options import Limits, ServerOptions

pytestmark = pytest.mark.timeout(3600)

PATHS = {
    "/v1/chat/completions": ("chat", {"messages": HI}),
    "/v1/completions": ("completions", {"prompt": "Hi"}),
    "/v1/responses": ("responses", {"input": "Hi"}),
    "/tokenize": ("tokenize", {"prompt": "Hi"}),
    "/detokenize": ("detokenize", {"tokens": [1, 2]}),
}
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, 1.0, 1e308, -1e308, 1 << 31, 1 << 63, -(1 << 64), 10**400),
    *("", "a", "\x00", "\ud800", "é" * 50, "<|im_end|>", "</tool_call>", "json", "required", "none", "auto", "length"),
    *([], {}, [[]], [None], [1], [1, 2, 3], ["a"], [{}], [[1], [2]], [-1], [1 << 40], {"a": 1}, {"1": 5}, {"1": "x"}),
    *({"type": "json_object"}, {"type": "json_schema"}, {"regex": "[ab]"}, {"choice": ["x", "y"]}, {"json": {}}),
    *({"type": "function", "function": {"name": "f"}}, [{"type": "function", "name": "f", "parameters": {}}]),
    *([{"role": "user", "content": "x"}], [{"role": "tool", "content": [{"type": "text", "text": "y"}]}], HI * 3),
    *(
        {"plain": True},
        {"score_from": 1},
        {"min_confidence": 0.3},
        {"include_usage": True},
        {"format": {"type": "text"}},
        {"effort": "low"},
    ),
]
OF_LIBRARIES = re.compile(r"nput should|ield required|should have|xtra inputs|alue error|parsing the body|pydantic")


@pytest.fixture(scope="module")
def server(tiny: TinyBundles) -> Iterator[Running]:
    limits = Limits(max_output_tokens=3, max_n=4)
    with running(tiny.get().directory, ServerOptions(log_format="json"), limits=limits) as server:
        yield server


def a_request(chance: random.Random) -> tuple[str, bytes]:
    path = chance.choice(list(PATHS))
    endpoint, least = PATHS[path]
    body: Any = dict(least)
    names = list(TABLE[endpoint])  # type: ignore[index]
    for _ in range(chance.randint(0, 3)):
        body[chance.choice(names)] = chance.choice(ODD)
    data = json.dumps(body).encode()
    match chance.randint(0, 19):
        case 0:
            data = data[: chance.randint(0, len(data))]
        case 1:
            place = chance.randrange(len(data))
            data = data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
        case 2:
            data = json.dumps(chance.choice(ODD)).encode()
    return path, data


def fuzz(server: Running, count: int, seed: int) -> None:
    chance, app = random.Random(seed), server.server.config.loaded_app
    statuses: dict[int, int] = {}

    async def one() -> None:
        path, data = a_request(chance)
        status, body = await call(app, "POST", path, data)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500 and status != 422, (path, data, status, body)
        if status != 200:
            told = json.loads(body)["error"]
            assert set(told) == {"message", "type", "param", "code"}
            assert not OF_LIBRARIES.search(told["message"]), told

    async def some() -> None:
        for _ in range(0, count, 16):
            await asyncio.gather(*(one() for _ in range(16)))

    assert server.server.loop is not None
    asyncio.run_coroutine_threadsafe(some(), server.server.loop).result()
    counts = server.served.llm.snapshot()
    assert counts.running == counts.waiting == 0 == server.server.home.lifecycle.num_open
    assert server.served.llm._requests == {}
    assert statuses[200] > count / 50 and statuses[400] > count / 50, statuses


def test_fuzzed_requests(server: Running) -> None:
    fuzz(server, 10_000, seed=1)  # a millisecond each


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_million_fuzzed_requests(server: Running, part: int) -> None:
    for run in range(5 * part, 5 * part + 5):
        fuzz(server, 10_000, seed=1000 + run)
        print(f"{(run + 1) * 10_000} requests", flush=True)  # seen with -s


def test_answers_are_as_documented(server: Running) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, settings
        from schemathesis.checks import not_a_server_error
        from schemathesis.specs.openapi.checks import (
            content_type_conformance,
            response_schema_conformance,
            status_code_conformance,
        )

        document = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
        checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
        for result in document.get_all_operations():
            operation = result.ok()

            @given(case=operation.as_strategy())
            @settings(
                max_examples=5,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def run(case: Any) -> None:
                case.call_and_validate(checks=checks)

            run()
