"""What reaches the server's border: errors in OpenAI's form, keys, limits, broken connections."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import parser
from runtime_support import TinyBundles, wait_until
from server_support import HI, Running, running

from dmtd_runtime import RequestError
from dmtd_runtime.server.options import Limits, ServerOptions
from dmtd_runtime.serving.options import ServingOptions

pytestmark = pytest.mark.timeout(300)

KEYS = ["first-key-1", "second-key-2"]
HALF_PAIR = "got half a surrogate pair at character 2, expected text that UTF-8 can write; remove it"
NO_KEY = "this server knows no such key; leave it out"
CHOICES = 'got "x", expected none, auto, required or an object'
ROLES = "expected system, developer, user, assistant or tool"
NO_LOGPROBS = "needs prompt_logprobs, or echo with logprobs: what it scores is told nowhere else"
NO_STOP = "got an empty string, expected at least one character; leave it out"
NESTED = b'{"a":' * 400 + b"1" + b"}" * 400
PARTS = [{"role": "user", "content": [{"type": "text", "text": "ab\udc00"}]}]
LISTS = "a list of texts or a list of lists of integers"
AUTH = {"Authorization": f"Bearer {KEYS[1]}"}
LIMITS = Limits(
    max_body_bytes=20_000,
    max_header_bytes=8192,
    header_timeout_s=0.5,
    body_timeout_s=0.5,
    write_timeout_s=0.5,
    max_n=3,
    max_stop=2,
    max_stop_chars=5,
    max_prompts=4,
    max_prompt_tokens=100,
    max_output_tokens=200,
    max_logprobs=3,
    max_logit_bias=2,
    max_messages=3,
    max_schema_bytes=300,
    max_schema_depth=5,
)


@pytest.fixture(scope="module")
def server(tiny: TinyBundles) -> Iterator[Running]:
    options = ServerOptions(api_key=KEYS, served_model_name=["tiny"])
    with running(tiny.get().directory, options, limits=LIMITS) as server:
        yield server


def is_idle(server: Running) -> bool:
    counts = server.served.llm.snapshot()
    return counts.running == counts.waiting == 0 == server.server.home.lifecycle.num_open


# Errors and limits


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 4}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"stop": "abcdef"}, "stop"),
        ({"max_tokens": 201}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0, "max_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 2, "max_tokens": 3}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"messages": HI * 4}, "messages"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 120}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "x" * 300}}}},
            "response_format",
        ),
        ({"structured_outputs": {"json": {"a": {"b": {"c": {"d": {"e": {"f": {}}}}}}}}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"dmtd": {"plain": True}}, "dmtd.plain"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
        ({"seed": 1 << 70}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"guided_json": {}}, "guided_json"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_what_cannot_be_served_is_400_with_the_field(server: Running, change: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 1, **change}, headers=AUTH)
    told = answer.json()["error"]
    assert (answer.status_code, told["type"]) == (400, "invalid_request_error"), answer.text
    assert told["param"] in (param, param.partition("[")[0]) and told["message"].startswith(param.partition("[")[0])


def test_a_context_too_long_is_told_in_the_words_that_harnesses_look_for(server: Running) -> None:
    for body, numbers in (
        ({"prompt": [1] * 256}, ("256", "256")),
        ({"prompt": [1] * 90, "max_tokens": 190}, ("90", "190")),
    ):
        answer = server.post("/v1/completions", body, headers=AUTH)
        told = answer.json()["error"]
        assert (answer.status_code, told["code"]) == (400, "context_length_exceeded")
        assert "exceeds the available context size" in told["message"] and all(n in told["message"] for n in numbers)


def test_other_refusals(server: Running) -> None:
    for path, body, status in (
        ("/v1/completions", {"prompt": ["a"] * 5}, 400),
        ("/v1/completions", {"prompt": ""}, 400),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, 400),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404),
        ("/v1/completions", {"prompt": [1.5]}, 400),
        ("/v1/completions", {"prompt": [-1]}, 400),
        ("/v1/completions", {"prompt": "\ud800"}, 400),
        ("/v1/completions", {"prompt": "a", "model": "\ud800"}, 404),
        ("/v1/responses", {"input": "a", "previous_response_id": "r"}, 400),
        ("/v1/responses", {"input": [{"type": "input_image"}]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/v1/nothing", {}, 404),
        ("/v1/models", {}, 405),
    ):
        answer = server.post(path, body, headers=AUTH)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


CHAT = "/v1/chat/completions"


def chat_body(**change: Any) -> bytes:
    return json.dumps({"messages": HI, "max_tokens": 1, **change}).encode()


@pytest.mark.parametrize(
    ("path", "content", "param", "message"),
    [
        (CHAT, b"", None, "the body is empty, expected a JSON object"),
        (CHAT, b"null", None, "the body is null, expected a JSON object"),
        (CHAT, b"[1]", None, "the body is a list, expected a JSON object"),
        (CHAT, b'{"a": "\xff"}', None, "the body is not UTF-8: invalid start byte at byte 7; send JSON in UTF-8"),
        (CHAT, b'{"a" 1}', None, "the body is not JSON: expecting ':' delimiter at character 5"),
        (CHAT, b"[" * 10_000, None, "the body is nested too deeply; send fewer levels"),
        (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", None, "the body has a number of too many digits; send a smaller one"),
        (CHAT, b'{"messages": [' + NESTED + b"]}", "messages", "nested too deeply; send fewer levels"),
        (CHAT, b"{}", "messages", "missing, expected a list of objects"),
        (CHAT, chat_body(messages=["x"]), "messages[0]", 'got "x", expected an object'),
        (CHAT, chat_body(tool_choice="x"), "tool_choice", CHOICES),
        (CHAT, chat_body(tool_choice={"function": {}}), "tool_choice.function.name", "missing, expected text"),
        (CHAT, chat_body(tools=[{"type": "x"}]), "tools[0].type", 'got "x", expected function'),
        (CHAT, chat_body(stop=1), "stop", "got 1, expected text or a list of texts"),
        (CHAT, chat_body(stop=["a", 1]), "stop[1]", "got 1, expected text"),
        (CHAT, chat_body(seed=1.5), "seed", "got 1.5, expected an integer"),
        (CHAT, chat_body(n=0), "n", "got 0, expected 1 or more"),
        (CHAT, chat_body(stream="yes"), "stream", 'got "yes", expected true or false'),
        (CHAT, chat_body(temperature=float("nan")), "temperature", "got NaN, expected a finite number"),
        (CHAT, chat_body(logit_bias={"1": "x"}), "logit_bias.1", 'got "x", expected a number'),
        (CHAT, chat_body(request_id="a" * 200), "request_id", f'got "{"a" * 36}..., expected text of at most 128 characters'),
        (CHAT, chat_body(response_format={"type": "text", "z": 1}), "response_format.z", NO_KEY),
        (CHAT, chat_body(structured_outputs={"json": 4}), "structured_outputs.json", "got 4, expected an object or text"),
        (CHAT, chat_body(messages=[*HI, {"role": "user", "content": "ab\ud800"}]), "messages[1].content", HALF_PAIR),
        (CHAT, chat_body(messages=PARTS), "messages[0].content[0]", HALF_PAIR),
        (CHAT, chat_body(messages=[*HI, {"role": "foo", "content": "a"}]), "messages[1].role", f'got "foo", {ROLES}'),
        (CHAT, chat_body(dmtd={"score_from": 1}), "dmtd.score_from", NO_LOGPROBS),
        (CHAT, chat_body(stop=["a", ""]), "stop", NO_STOP),
        ("/v1/responses", b'{"input": "a", "dmtd": {"score_from": 1}}', "dmtd.score_from", NO_LOGPROBS),
        ("/v1/completions", b'{"prompt": "a", "logprobs": 1, "dmtd": {"score_from": 1}}', "dmtd.score_from", NO_LOGPROBS),
        ("/v1/responses", b'{"input": "ab\\ud800"}', "input", HALF_PAIR),
        ("/v1/responses", b'{"input": [3]}', "input[0]", "got 3, expected an object"),
        ("/v1/responses", b'{"input": "a", "tool_choice": "x"}', "tool_choice", CHOICES),
        ("/v1/responses", b'{"input": "a", "tools": [{"type": "function"}]}', "tools[0].name", "missing, expected text"),
        ("/v1/completions", b'{"prompt": "ab\\ud800"}', "prompt", HALF_PAIR),
        ("/v1/completions", b'{"prompt": {}}', "prompt", f"got an object, expected text, a list of integers, {LISTS}"),
        ("/tokenize", b"{}", "prompt", "expected either prompt or messages"),
        ("/tokenize", b'{"messages": [{"role": "", "content": "a"}]}', "messages[0].role", f'got "", {ROLES}'),
        ("/detokenize", b'{"tokens": ["a"]}', "tokens[0]", 'got "a", expected an integer'),
        ("/detokenize", b'{"tokens": [258, 259, 999]}', "tokens[1]", "got 259, expected ids from 0 to 258"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_got_and_expected(
    server: Running, path: str, content: bytes, param: str | None, message: str
) -> None:
    headers = {**AUTH, "Content-Type": "application/json"}
    answer = httpx.post(f"{server.root}{path}", content=content, headers=headers, timeout=60)
    told = answer.json()["error"]
    assert (answer.status_code, told["param"]) == (400, param), told
    assert told["message"] == (message if param is None else f"{param}: {message}")


def test_bodies_that_do_not_come_in(server: Running) -> None:
    for content, kind, status in (
        (b"{}", "text/plain", 415),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b" " * 20_001, "application/json", 413),
    ):
        answer = httpx.post(f"{server.root}{CHAT}", content=content, headers={**AUTH, "Content-Type": kind}, timeout=60)
        assert answer.status_code == status and "message" in answer.json()["error"]


def test_a_client_that_writes_its_whole_body_sees_that_it_was_too_large(server: Running) -> None:
    """Closing at once would reset the connection, and with it the answer."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in AUTH.items())
    pieces = [f"{5000:x}\r\n".encode() + b" " * 5000 + b"\r\n" for _ in range(14)]
    for size, body in ((70_000, [b" " * 70_000]), (None, [*pieces, b"0\r\n\r\n"])):
        length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
        with socket.create_connection(server.address, timeout=60) as client:
            client.sendall(f"{head}{length}\r\n\r\n".encode())
            for piece in body:
                client.sendall(piece)
            answer = b""
            while got := client.recv(4096):
                answer += got
        assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer.lower()


def test_tools_that_are_not_to_be_called_need_no_template(server: Running) -> None:
    """The template knows none; as vLLM does, whose templates leave out what they do not know."""
    with_tools, without = (
        server.post(CHAT, {"messages": HI, "max_tokens": 3, "temperature": 0, **more}, headers=AUTH).json()
        for more in ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}, {})
    )
    assert (
        with_tools["choices"] == without["choices"]
        and with_tools["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]
    )


def test_keys(server: Running) -> None:
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEYS[0]},
        {"Authorization": "Bearer " + KEYS[0][:-1]},
    ):
        answer = server.get("/v1/models", headers=header)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    for key in KEYS:
        assert server.get("/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200
    for path in ("/health", "/health/ready", "/v2/health/live", "/v2/health/ready", "/metrics"):
        assert server.get(path).status_code == 200
    assert server.get("/version").status_code == 401
    assert "access-control-allow-origin" not in server.get("/health", headers={"Origin": "http://a"}).headers


def test_an_open_bind_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(RequestError, match="no key"):
            ServerOptions(host=host).refuse_open_bind()
        ServerOptions(host=host, insecure=True).refuse_open_bind()
        ServerOptions(host=host, api_key=KEYS).refuse_open_bind()
    for host in ("127.0.0.1", "::1", "localhost"):
        ServerOptions(host=host).refuse_open_bind()
    with pytest.raises(RequestError) as caught:
        ServerOptions(api_key=["short"])
    assert "short" not in str(caught.value)


# Connections


def head(path: str = "/v1/completions", length: int = 0) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join((*lines, f"Authorization: {AUTH['Authorization']}", "", "")).encode()


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while more := connection.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    connection.close()
    return data


def test_half_requests_end(server: Running) -> None:
    slow = server.raw(b"POST /v1/comp")
    slower = server.raw(head(length=100) + b"{")
    assert read_all(slow) == b""  # dropped: no whole head in time
    assert b" 408 " in read_all(slower).split(b"\r\n")[0]
    assert b" 431 " in (told := read_all(server.raw(b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000))) or b" 400 " in told
    assert b" 400 " in read_all(server.raw(b"nonsense\r\n\r\n"))
    assert server.get("/health").status_code == 200


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    bodies = [json.dumps({"prompt": [5], "max_tokens": n}).encode() for n in (1, 2)]
    data = b"".join(head(length=len(body)) + body for body in bodies)
    connection = server.raw(data + b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    told = read_all(connection)
    assert told.count(b"HTTP/1.1 200") == 3
    assert told.index(b'"completion_tokens":1') < told.index(b'"completion_tokens":2') < told.index(b'"live"')


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(server: Running, stream: bool) -> None:
    body = json.dumps(
        {"prompt": [5], "max_tokens": 200, "ignore_eos": True, "stream": stream, "n": 3, "temperature": 1}
    ).encode()
    connections = [server.raw(head(length=len(body)) + body) for _ in range(8)]
    wait_until(lambda: server.server.home.lifecycle.num_open >= 1)
    for connection in connections:
        connection.close()
    wait_until(lambda: is_idle(server))


def test_answers_do_not_wait_for_acknowledgements(server: Running) -> None:
    connection = server.raw()
    wait_until(lambda: len(server.server.server_state.connections) > 0)
    sockets = [each.transport.get_extra_info("socket") for each in list(server.server.server_state.connections)]
    assert all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)
    connection.close()


def test_names_of_requests_and_headers(server: Running) -> None:
    assert server.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert server.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


# The queue


def test_a_full_queue_is_429_and_nothing_of_it_starts(tiny: TinyBundles) -> None:
    options, serving = ServerOptions(max_num_seqs=1), ServingOptions(max_num_queued_reqs=2)
    with running(tiny.get().directory, options, serving=serving) as server:
        prompts = [[token] for token in range(64)]  # more than a worker ends while they are queued
        answer = server.post("/v1/completions", {"prompt": prompts, "temperature": 1, "ignore_eos": True})
        assert answer.status_code == 429 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "queue_full"
        wait_until(lambda: is_idle(server))
        assert server.post("/v1/completions", {"prompt": [[1], [2]], "max_tokens": 2}).status_code == 200
        assert (
            b'dmtd:admission_rejections_total{model_name="bundle",engine="dmtd",reason="queue_full"} 1\n'
            in server.get("/metrics").content
        )


def test_metrics_count_what_was_asked(tiny: TinyBundles) -> None:
    with running(tiny.get().directory, ServerOptions(served_model_name=["m"], allow_plain=True)) as server:
        body = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}
        server.post("/v1/completions", {"prompt": [[1, 2, 3], [4]], **body})
        server.post("/v1/completions", {"prompt": [7] * 6, **body, "dmtd": {"plain": True}})
        text = server.get("/metrics").text
        samples = {}
        for family in parser.text_string_to_metric_families(text):
            for each in family.samples:
                engine, name = each.labels.pop("engine"), each.labels.pop("model_name")
                samples[engine, each.name.removeprefix("dmtd:"), *each.labels.values()] = each.value
                assert name == "m"
        for key, of_dmtd, of_plain in (
            ("prompt_tokens_total", 4, 6),
            ("generation_tokens_total", 10, 5),
            ("num_requests_running", 0, 0),
            ("request_success_total length", 2, 1),
            ("time_to_first_token_seconds_count", 2, 1),
            ("inter_token_latency_seconds_count", 8, 4),
            ("inter_token_latency_seconds_bucket +Inf", 8, 4),
            ("e2e_request_latency_seconds_count", 2, 1),
            ("request_generation_tokens_sum", 10, 5),
            ("request_generation_tokens_bucket 4", 0, 0),
            ("request_generation_tokens_bucket 16", 2, 1),
            ("iteration_tokens_total_sum", 4 + 8, 6 + 4),
            ("iteration_tokens_total_bucket 1", None, 4),
            ("full_passes_total", None, 1 + 4),
            ("late_steps_total", None, 0),
        ):
            assert samples["plain", *key.split()] == of_plain, key
            assert of_dmtd is None or samples["dmtd", *key.split()] == of_dmtd, key
        assert samples["dmtd", "late_steps_total"] > 0
