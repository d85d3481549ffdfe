"""Streams and signals of the `dmtd` process: closed, full or narrow streams, and ends that come from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import make_bundle

ROOT = Path(__file__).resolve().parents[3]
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "runtime", "models"))}
COMMAND = f"{sys.executable} -m dmtd_export.cli"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("process"))


def shell(line: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(line, shell=True, capture_output=True, env=ENVIRON | environ, check=False)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done


def test_an_answer_that_the_encoding_cannot_write(bundle: Path) -> None:
    # A random model's bytes: most answers hold U+FFFD, as is asserted of this one.
    line = f"{COMMAND} generate {bundle} -p h --max-tokens 24 --temperature 1 --seed 1 --ignore-eos"
    whole = shell(line, PYTHONIOENCODING="utf-8").stdout.decode()
    assert any(ord(letter) > 255 for letter in whole)
    narrow = shell(line, PYTHONIOENCODING="latin-1")
    assert narrow.returncode == 0
    assert narrow.stdout == whole.encode("latin-1", errors="replace")


def test_tables_in_a_narrow_encoding(bundle: Path) -> None:
    assert shell(f"{COMMAND} inspect {bundle}", PYTHONIOENCODING="ascii").returncode == 0


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("generate {} <&-", 2, "empty prompt"),
        ("generate {} -p x --max-tokens 2 >&-", 1, "stdout is closed"),
        ("generate {} -p x --max-tokens 2 2>&-", 0, ""),
        ("--version >/dev/full", 1, "stdout cannot be written"),
        ("--help >/dev/full", 1, "stdout cannot be written"),
        ("inspect {} --json >/dev/full", 1, "no space left"),
    ],
)
def test_closed_and_full_streams(line: str, code: int, words: str, bundle: Path) -> None:
    done = shell(f"{COMMAND} {line.format(bundle)}")
    assert done.returncode == code, done.stderr
    errors = [each for each in done.stderr.decode().splitlines() if not each.startswith("note: ")]
    assert len(errors) == bool(words)
    assert words in "".join(errors)


def test_a_closed_stdout_is_no_file_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """Descriptor 1 is free then: the next file that is opened would take it, and printing would go into that."""
    checkpoint = bundle.parent / "checkpoint"
    split = "--decoding-layers 2 --cycle-length 3 --no-verify"
    assert shell(f"{COMMAND} export {checkpoint} -o {tmp_path / 'closed'} {split} >&-").returncode == 1
    assert shell(f"{COMMAND} export {checkpoint} -o {tmp_path / 'open'} {split}").returncode == 0
    for name in ("model.onnx.data", "thinking.ort.onnx"):
        assert (tmp_path / "closed" / name).read_bytes() == (tmp_path / "open" / name).read_bytes()


def start(code: str, **settings: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRON,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **settings,
    )


# An export that stops between two tensors, says so, and waits for the signal.
WAITING_EXPORT = """
import sys, time
import dmtd_export.bundle.export as export
def wait(*args, **kwargs):
    print("at work", flush=True)
    time.sleep(60)
export.write_weights = wait
from dmtd_export.cli.__main__ import main
main(["export", {source!r}, "-o", {output!r}, "--decoding-layers", "2", "--cycle-length", "3"])
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_leaves_no_work_directory(name: str, bundle: Path, tmp_path: Path) -> None:
    number = signal.Signals[name]
    process = start(WAITING_EXPORT.format(source=str(bundle.parent / "checkpoint"), output=str(tmp_path / "out")))
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert errors.splitlines()[-1] == ("interrupted" if name == "SIGINT" else "terminated")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    code = """
import signal
from dmtd_runtime.cli.process import unwind_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
unwind_on_signals()
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
"""
    assert start(code).communicate(timeout=60)[0] == "True\n"


# Ctrl-C comes while the module named is being imported, wherever its importer would pass it on.
EARLY = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from dmtd_export.cli.__main__ import main
main(["inspect", "nothing"])
"""


@pytest.mark.parametrize("module", ["typer", "dmtd_runtime.cli.inspect"])
def test_ctrl_c_while_modules_are_loaded(module: str) -> None:
    process = start(EARLY.format(module=module))
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
