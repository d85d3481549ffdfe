"""The command as a process of its own: signals, closed pipes, full disks, tracebacks, and what it loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
ENVIRON = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "runtime", "models")),
    "COLUMNS": "100",
}
COMMAND = (sys.executable, "-m", "dmtd_export.cli")


def start(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRON, **settings
    )


@pytest.mark.parametrize("verb", ["generate", "bench", "chat"])
def test_ctrl_c_is_one_line_and_130(verb: str, bundle: str) -> None:
    arguments = {
        "generate": ("-p", "x", "--ignore-eos", "--max-tokens", "200", "--full-pass", "staged"),
        "bench": ("--prompt-len", "8", "--max-tokens", "200", "--repeats", "100000"),
        "chat": (),
    }[verb]
    # A test runner in the background may have SIGINT ignored, which children inherit.
    process = start(
        verb,
        bundle,
        *arguments,
        stdin=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None and process.stderr is not None and process.stdout is not None
    if verb == "generate":
        process.stdout.read(1)
    elif verb == "bench":
        process.stdout.readline()
        time.sleep(0.3)
    else:
        process.stderr.readline()  # the note on untrained weights: the bundle is open
        time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    if verb == "generate" and process.returncode == 0:
        pytest.skip("the answer was complete before the signal came")
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors


def test_a_reader_that_leaves_is_no_error(bundle: str) -> None:
    done = subprocess.run(
        f"{' '.join(COMMAND)} inspect {bundle} | head -1",
        shell=True,
        capture_output=True,
        text=True,
        env=ENVIRON,
        check=False,
    )
    assert done.stdout.startswith("model")
    assert done.stderr == ""


def test_a_full_disk_is_one_line(bundle: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "inspect", bundle], stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRON, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: no space left")
    assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback() -> None:
    broken = "import dmtd_runtime.cli.doctor_facts as d; d.collect = lambda: 1 / 0"
    code = f"{broken}; from dmtd_export.cli.main import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRON, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert "ZeroDivisionError" in done.stderr


def test_help_loads_no_library() -> None:
    code = (
        "import sys; from dmtd_export.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnxruntime', 'onnx', 'torch', 'tokenizers', 'jinja2', 'safetensors'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRON, check=False)
    assert done.stderr == "[]\n"
    assert "generate" in done.stdout


def test_stdin_that_is_not_utf8_is_named(bundle: str) -> None:
    program = [sys.executable, "-c", "from dmtd_export.cli.main import main; main()", "generate", bundle]
    done = subprocess.run(program, input=b"a\xff\xfeb", capture_output=True, timeout=120, check=False)
    assert done.returncode == 2
    assert b"error: --prompt: stdin is not UTF-8 at byte 1" in done.stderr
