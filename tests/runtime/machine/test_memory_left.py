"""Memory that is not there: one line with what is needed and what is left, whichever library noticed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from bundles import make_bundle
from typer.testing import CliRunner

from dmtd_export.bundle.target import one_line_os_errors
from dmtd_export.cli.main import app
from dmtd_runtime import LLM, BackendError
from dmtd_runtime.backends.kv_cache import HostKvCache
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.cli.common import require
from dmtd_runtime.errors import MissingExtraError
from dmtd_runtime.machine.memory import memory_left, one_line_memory, ran_out, return_freed_memory


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("memory"))


def refuse(*_: object, **__: object) -> object:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_caches_beyond_the_address_space(bundle: Path) -> None:
    model = load_manifest(bundle).model
    for capacity in (1 << 50, 1 << 62, 1 << 80):
        with pytest.raises(MemoryError):
            HostKvCache(model, 1, capacity)


def test_caches_that_cannot_be_had(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", refuse)
    done = CliRunner().invoke(app, ["generate", str(bundle), "-p", "x"])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    # Five layers, keys and values, two heads of 16, float32, 256 positions and a window of 256.
    assert f"caches of 1 x 512 rows {5 * 2 * 2 * 16 * 4 * 512 / 1e6:.2f} MB" in done.stderr
    assert "left; lower --max-model-len or --max-num-seqs" in done.stderr
    with pytest.raises(BackendError, match="caches of 2 x 356 rows"):
        LLM(bundle, max_num_seqs=2, max_model_len=100)


def test_too_little_for_onnx_runtime(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise RuntimeError("Exception during initialization: std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(BackendError, match="not enough memory") as caught:
        LLM(bundle)
    assert "export the bundle again" not in str(caught.value)


def test_a_thread_that_cannot_be_started(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fail)
    with pytest.raises(BackendError, match="not enough memory"):
        LLM(bundle)


def test_a_limit_of_the_process_is_what_is_left() -> None:
    """The kernel's own answer: what is said to be left can be mapped, twice as much cannot."""
    code = """
import mmap, resource, sys
from dmtd_runtime.machine.memory import memory_left
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
left = memory_left()
assert left is not None and 0 < left < 1 << 30, left
kept = mmap.mmap(-1, left // 2)
try:
    mmap.mmap(-1, left)
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{errno.ENOMEM}\n", "")
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY or memory_left() is not None


def test_what_says_that_memory_ran_out() -> None:
    chained = RuntimeError("outer")
    chained.__cause__ = MemoryError()
    for error in (MemoryError(), OSError(errno.ENOMEM, "x"), RuntimeError("std::bad_alloc"), chained):
        assert ran_out(error)
    for error in (OSError(errno.ENOSPC, "x"), RuntimeError("x"), None):
        assert not ran_out(error)
    with pytest.raises(ZeroDivisionError), one_line_memory({}, ""):
        _ = 1 / 0


def test_no_fault_of_the_output_directory(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Cannot allocate"), one_line_os_errors(tmp_path):
        refuse()


def test_a_verb_that_runs_out_of_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmtd_runtime.bundle.describe.to_json", refuse)
    done = CliRunner().invoke(app, ["inspect", str(bundle), "--json"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: not enough memory (Cannot allocate memory")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory"),
        (OSError("libtorch_global_deps.so: cannot open shared object file"), "cannot be imported"),
        (RuntimeError("module functions cannot set METH_CLASS"), "cannot be imported"),
    ],
)
def test_a_library_that_cannot_be_imported(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> Any:
        raise error

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(MissingExtraError, match=words) as caught:
        require("finetune", ["torch"], "train")
    assert "\n" not in str(caught.value)


def test_verify_says_that_torch_cannot_be_imported(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmtd_export.verify import levels

    monkeypatch.setattr(levels, "_import_problem", lambda name: f"{name}: failed to map segment")
    plan = levels.make_plan(bundle, load_manifest(bundle), None, object())  # type: ignore[arg-type]
    assert plan.level == "graphs"
    assert plan.note == "level lowered to graphs: PyTorch cannot be imported (torch: failed to map segment)"
    assert levels.make_plan(bundle, load_manifest(bundle), "graphs", object()).level == "graphs"  # type: ignore[arg-type]


def test_another_c_library_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert return_freed_memory() in (True, False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert return_freed_memory() is False
