"""`dmtd serve` as a process: options of all sources, the drain, the engine's death, and what the log holds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from runtime_support import TinyBundles, held, wait_until
from server_support import HI, chunks, running
from typer.testing import CliRunner

from dmtd_export.cli.main import app
from dmtd_runtime.errors import RequestError
from dmtd_runtime.server.options import ServerOptions
from dmtd_runtime.server.run import Server, Settings

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[3]
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "runtime", "models"))}
SECRET = "a-secret-key-0"
WIDE = {"COLUMNS": "400"}  # of an error no line is broken


@contextmanager
def process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server with its URL and the lines of its log so far."""
    command = [
        sys.executable,
        "-m",
        "dmtd_export.cli.main",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--threads",
        "1",
        *options,
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**ENVIRON, "DMTD_API_KEY": SECRET})
    lines: list[str] = []

    def read() -> None:
        for line in child.stderr or ():
            lines.append(line)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_until(lambda: any(" at http" in line for line in lines) or child.poll() is not None)
        [url] = [found[1] for line in lines if (found := re.search(r"at (http\S+)/v1", line))]
        yield child, url, lines
    finally:
        child.kill()
        child.wait()
        reader.join()
        assert child.stderr is not None
        child.stderr.close()


def test_a_drain_ends_what_runs_and_refuses_what_comes(tiny: TinyBundles) -> None:
    with running(tiny.get().directory, ServerOptions(shutdown_timeout_s=30)) as server:
        loop, lifecycle = server.server.loop, server.server.home.lifecycle
        assert loop is not None
        told: list[httpx.Response] = []
        body = {"prompt": [5], "max_tokens": 20, "ignore_eos": True, "stream": True, "temperature": 0}
        with held(server.served.llm, after=2) as hold:  # type: ignore[arg-type]
            asking = threading.Thread(target=lambda: told.append(server.post("/v1/completions", body)))
            asking.start()
            hold.wait()
            loop.call_soon_threadsafe(lifecycle.drain)
            wait_until(lambda: lifecycle.state == "draining")
            assert server.get("/health/ready").status_code == 503 == server.get("/v2/health/ready").status_code
            assert server.get("/health").status_code == 200 == server.get("/v2/health/live").status_code
            refused = server.post("/v1/completions", body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"]
        asking.join()
        server.thread.join(60)
        assert server.codes == [0] and chunks(told[0])[-2]["choices"][0]["finish_reason"] == "length"


def test_what_outlives_the_drain_is_aborted_with_its_reason(tiny: TinyBundles) -> None:
    with running(tiny.get().directory, ServerOptions(shutdown_timeout_s=0)) as server:
        told: list[httpx.Response] = []
        body = {"prompt": [5], "max_tokens": 200, "ignore_eos": True, "temperature": 0}
        with held(server.served.llm, after=2, until=lambda: server.server.home.lifecycle.state != "ready") as hold:  # type: ignore[arg-type]
            threads = [
                threading.Thread(target=lambda s=s: told.append(server.post("/v1/completions", {**body, "stream": s})))
                for s in (True, False)
            ]
            for thread in threads:
                thread.start()
            hold.wait()
            wait_until(lambda: server.server.home.lifecycle.num_open == 2)
            assert server.server.loop is not None
            server.server.loop.call_soon_threadsafe(server.server.home.lifecycle.drain)
            for thread in threads:
                thread.join()
        whole, streamed = sorted(told, key=lambda answer: "event-stream" in answer.headers["content-type"])
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutting_down")
        assert chunks(streamed)[-2]["error"]["code"] == "shutting_down"


def test_the_engines_death_is_every_requests_error_and_the_exit_code(tiny: TinyBundles) -> None:
    with running(tiny.get().directory) as server:
        backend = server.served.llm._worker._backend

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("the device fell off")

        backend.run = fail  # type: ignore[method-assign]
        answer = server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 5})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
        assert "fell off" not in answer.text
        server.thread.join(60)
        assert server.codes == [1] and not server.thread.is_alive()


def test_a_second_signal_ends_it_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    server = Server(Settings(bundle=tmp_path), lambda url, seconds: None)
    server.home.lifecycle.state = "draining"
    server._signalled()
    assert codes == [128 + signal.SIGTERM]


def test_a_process_from_start_to_signal(tiny: TinyBundles) -> None:
    with process(tiny.get().directory, "--log-format", "json") as (child, url, lines):
        auth = {"Authorization": f"Bearer {SECRET}", "X-Request-Id": "mine"}
        body = {"messages": [{"role": "user", "content": "a very private matter"}], "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=auth, timeout=60).status_code == 200
        assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    log = "".join(lines)
    assert "private" not in log and SECRET not in log
    told = [json.loads(line) for line in lines if line.startswith("{")]
    [mine] = [line for line in told if line.get("request_id") == "mine"]
    assert (mine["path"], mine["status"], mine["method"]) == ("/v1/chat/completions", 200, "POST")


def test_a_bundle_that_is_none_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0"])
    assert done.exit_code == 1 and len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


# Options


def would_hold(*words: str, env: dict[str, str] | None = None) -> dict[str, tuple[str, str]]:
    done = CliRunner().invoke(app, ["serve", "BUNDLE", "--dry-run", *words], env=env or {})
    assert done.exit_code == 0, done.stderr
    rows = [re.fullmatch(r"(\S+): (.*?) *# (.*)", line) for line in done.stdout.splitlines()]
    return {row[1]: (row[2], row[3]) for row in rows if row}


def test_defaults_file_environment_flags(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "port: 1\nmax-n: 2\nmax_stop: 3\nshutdown-timeout: 4\nlog-format: json\nserved-model-name: [a, b]\n"
    )
    env = {
        "DMTD_PORT": "10",
        "DMTD_MAX_N": "20",
        "DMTD_API_KEY": "key-number-1 key-number-2",
        "DMTD_QUEUE_TIMEOUT": "5",
    }
    told = would_hold("--config", str(file), "--port", "100", env=env)
    assert told["port"] == ("100", "flag") and told["max-n"] == ("20", "environment")
    assert told["max-stop"] == ("3", "file") and told["max-stop-chars"] == ("256", "default")
    assert told["shutdown-timeout"] == ("4.0", "file") and told["queue-timeout"] == ("5.0", "environment")
    assert told["served-model-name"] == ('["a", "b"]', "file")
    shown = CliRunner().invoke(app, ["serve", "BUNDLE", "--dry-run"], env=env).stdout
    assert "key-number" not in shown and "# 2 not shown" in shown


def test_every_option_has_a_variable() -> None:
    from dmtd_export.cli.main import VERBS, _LazyCommand
    from dmtd_runtime.cli.places import variable_of

    command = _LazyCommand("serve", VERBS["serve"]).load()
    env = {"DMTD_MAX_LOGPROBS": "3", "DMTD_PREFIX_CACHE_BYTES": "7", "DMTD_MAX_MODEL_LEN": "9", "DMTD_INSECURE": "1"}
    env["DMTD_ALLOWED_ORIGIN"] = "http://a"
    told = would_hold(env=env)
    for name, value in env.items():
        assert told[name.removeprefix("DMTD_").lower().replace("_", "-")][0] in (value, "true", f'["{value}"]')
    assert len(command.params) > 50
    context = command.make_context("serve", ["BUNDLE"])
    for each in command.params:
        flags = [flag for flag in each.opts if flag.startswith("--")]
        if each.param_type_name == "option":
            assert variable_of(context, each) == "DMTD_" + flags[0].lstrip("-").upper().replace("-", "_")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nonsense: 1", "no option"),
        ("[1]", "got a sequence, expected names"),
        ("a: [", "cannot be read"),
        ("port: x", "Invalid value for port in "),
        ("max-n: 2.5", "Invalid value for max-n in "),
        ("port: true", "Invalid value for port in "),
        ("port: [1]", "'port': got a sequence, expected one value"),
        ("api-key: {a: b}", "'api-key': got a mapping, expected a value or a list of values"),
        ("port: 1\nport: 2", "'port' is given twice"),
        ("max-n: 1\nmax_n: 2", "'max_n' is given twice"),
        ("max-n: 0", "max-n in "),
        ("root_path: api", "root_path in "),
    ],
)
def test_a_bad_file_is_named_with_the_key(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    done = CliRunner().invoke(app, ["serve", "BUNDLE", "--dry-run", "--config", str(file)], env=WIDE)
    assert done.exit_code == 2 and problem in done.stderr and "serve.yaml" in done.stderr, done.stderr
    assert "--port" not in done.stderr and "--max-n" not in done.stderr and "--root-path" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("DMTD_PORT", "x"), ("DMTD_PORT", "70000"), ("DMTD_THREADS", "0"), ("DMTD_SHUTDOWN_TIMEOUT", "-1")],
)
def test_a_bad_variable_is_named(name: str, value: str) -> None:
    done = CliRunner().invoke(app, ["serve", "BUNDLE", "--dry-run"], env={name: value, **WIDE})
    assert done.exit_code == 2 and f"{name}: " in done.stderr and "--port" not in done.stderr, done.stderr
    flag = "--" + name.removeprefix("DMTD_").lower().replace("_", "-")
    done = CliRunner().invoke(app, ["serve", "BUNDLE", "--dry-run", flag, value], env=WIDE)
    assert done.exit_code == 2 and flag in done.stderr and name not in done.stderr, done.stderr


def test_values_of_a_file_are_read_as_the_command_line_is(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("insecure: yes\nserved-model-name: m\nlog-requests: false\nmax-stop:\nqueue-timeout: 1e3\n")
    told = would_hold("--config", str(file))
    assert told["insecure"] == ("true", "file") and told["served-model-name"] == ('["m"]', "file")
    assert told["log-requests"] == ("false", "file") and told["queue-timeout"] == ("1000.0", "file")
    assert told["max-stop"] == ("16", "default")


@pytest.mark.parametrize(
    "origin", ["foo", "https://", "https://a/", "https://a/b", "https://A", "http://a b", "//a", ""]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(RequestError, match="expected an origin"):
        ServerOptions(allowed_origins=[origin])
    for good in ("*", "https://example.org", "http://localhost:3000", "http://[::1]:80", "chrome-extension://abc"):
        ServerOptions(allowed_origins=[good])


@pytest.mark.parametrize("path", ["api", "/", "/api/", "//api", "/a b", "/a?b", "http://a/b"])
def test_what_is_no_prefix_is_refused(path: str) -> None:
    with pytest.raises(RequestError, match="begins with a slash"):
        ServerOptions(root_path=path)
    for good in ("", "/api", "/models/dmtd-1.0"):
        ServerOptions(root_path=good)
