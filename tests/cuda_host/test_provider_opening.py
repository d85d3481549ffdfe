"""What the real wheel needs is named where it is missing, before a session is asked for, and nothing else is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda_host

OPEN = """
import sys
from dmtd_runtime.ort.cuda_provider import prepare
from dmtd_runtime.ort.library import import_onnxruntime
from dmtd_runtime.errors import BackendError
try:
    prepare(import_onnxruntime(), 0)
except BackendError as error:
    open(sys.argv[1], "w").write(str(error))
"""
OLD_DRIVER = "int cuDriverGetVersion(int *version) { *version = 12080; return 0; }\n"


def opened(tmp_path: Path, libraries: Path) -> str:
    """What is refused with these libraries, "" where it opens."""
    told = tmp_path / "told"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, "-c", OPEN, str(told)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return told.read_text() if told.exists() else ""


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder with all stand-ins, of which a test may take some away."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    for path in Path(os.environ["LD_LIBRARY_PATH"]).glob("*.so*"):
        (folder / path.name).symlink_to(path)
    return folder


def take_away(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()
    command = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", names[0]]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
        pytest.skip(f"this machine has {names[0]} of its own")


def test_it_opens_over_all_of_them(tmp_path: Path, libraries: Path) -> None:
    assert opened(tmp_path, libraries) == ""


def test_it_opens_without_cudnn(tmp_path: Path, libraries: Path) -> None:
    take_away(libraries, "libcudnn.so.9")
    assert opened(tmp_path, libraries) == ""


def test_linked_libraries_that_are_missing_are_named(tmp_path: Path, libraries: Path) -> None:
    take_away(libraries, "libcublas.so.13", "libcublasLt.so.13")
    text = opened(tmp_path, libraries)
    assert "needs libcublasLt.so.13, libcublas.so.13, which cannot be loaded" in text
    assert text.endswith('run: pip install "dmtd[gpu]"')


def test_without_a_driver(tmp_path: Path, libraries: Path) -> None:
    take_away(libraries, "libcuda.so.1")
    text = opened(tmp_path, libraries)
    assert "no NVIDIA driver is on this machine (libcuda.so.1: cannot open shared object file" in text
    assert "580 or newer" in text


def test_with_a_driver_of_an_older_cuda_release(tmp_path: Path, libraries: Path) -> None:
    source, library = tmp_path / "driver.c", libraries / "libcuda.so.1"
    source.write_text(OLD_DRIVER)
    library.unlink()
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    text = opened(tmp_path, libraries)
    assert "takes CUDA 12.8, and this ONNX Runtime is built for CUDA 13; update the driver to 580 or newer" in text


def test_a_driver_without_a_gpu(tmp_path: Path, libraries: Path) -> None:
    """CUDA's own error is told in its words, without ONNX Runtime's "EP Error" on stdout."""
    source, library = tmp_path / "runtime.c", libraries / "libfirst.so"
    source.write_text("int cudaSetDevice(int device) { return 100; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    told = tmp_path / "told"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", OPEN, str(told)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "GPU 0 cannot be used: " in told.read_text()
    assert "give the container the GPU" in told.read_text()
