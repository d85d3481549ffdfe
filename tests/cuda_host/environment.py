"""Makes the environment of these tests, once, and runs them in it: python tests/cuda_host/environment.py [PYTEST OPTIONS]

In build/cuda_host of the repository: a virtual environment with onnxruntime-gpu and what export and runtime need, the CUDA
headers of a wheel, and the stand-ins that gcc makes of them. cuda-bindings stay out: their copy of the CUDA runtime wants a
driver, and modules/ stands in for it. The numbers of every case stay in reports/ as JSON. Needs gcc and pip's index at the
first run. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_host"
# The stand-ins have the functions that this release calls, no more.
PROVIDER = "onnxruntime-gpu==1.31.1"
HEADERS = ("nvidia-cuda-runtime>=13,<14", "nvidia-cuda-crt>=13,<14")
TESTS = ("pytest", "pytest-timeout", "hypothesis")


def main(options: list[str]) -> int:
    python = BUILD / "venv" / "bin" / "python"
    needs = [PROVIDER, *_requirements()]
    if _outdated("environment", sys.version, *needs):
        _say("the environment of the CUDA provider's tests, some 600 MB")
        shutil.rmtree(python.parents[1], ignore_errors=True)
        venv.create(python.parents[1], with_pip=True)
        _run(python, "-m", "pip", "install", "-qq", *needs)
        _stamp("environment", sys.version, *needs)
    sources = sorted((HERE / "stand_ins").iterdir())
    contents = [path.read_text() for path in sources]
    if _outdated("stand-ins", *HEADERS, *contents):
        if shutil.which("gcc") is None:
            sys.exit("error: gcc: not found; install it (Debian, Ubuntu: apt-get install gcc)")
        _say("the stand-ins of the CUDA libraries")
        with tempfile.TemporaryDirectory() as scratch:
            _run(HERE / "stand_ins" / "build", BUILD / "lib", _unpack_headers(python, Path(scratch)))
        _stamp("stand-ins", *HEADERS, *contents)
    reports = BUILD / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    places = (HERE / "modules", HERE.parent, ROOT, ROOT / "runtime", ROOT / "models")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "LD_LIBRARY_PATH": str(BUILD / "lib"),
        "OMP_NUM_THREADS": "1",
        "DMTD_CUDA_HOST": str(reports),
    }
    selection = ("-m", "cuda_host", "-o", "testpaths=tests/cuda_host", "--timeout", "300", "--tb", "short")
    return subprocess.run([python, "-m", "pytest", *selection, *options], cwd=ROOT, env=environment).returncode


def _requirements() -> list[str]:
    """What runtime and export depend on, as the project says it, and the tools of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {need.partition(">")[0]: need for need in extras["test"]}
    return [*project["dependencies"], *extras["export"], *(pinned.get(name, name) for name in TESTS)]


def _unpack_headers(python: Path, scratch: Path) -> Path:
    """The folder of cuda_runtime_api.h."""
    _run(python, "-m", "pip", "download", "-qq", "--no-deps", "-d", scratch, *HEADERS)
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
    return next(scratch.rglob("cuda_runtime_api.h")).parent


def _outdated(what: str, *parts: str) -> bool:
    stamp = BUILD / f"{what}.stamp"
    return not stamp.exists() or stamp.read_text() != _key(*parts)


def _stamp(what: str, *parts: str) -> None:
    (BUILD / f"{what}.stamp").write_text(_key(*parts))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _run(*command: str | Path) -> None:
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, command))} failed:\n{done.stdout}")
    _say(f"  {Path(command[0]).name} {' '.join(map(str, command[1:4]))} ... {time.monotonic() - started:.0f} s")


def _say(words: str) -> None:
    print(words, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
