"""What a measurement ran on, as far as the machine tells: GPU, libraries, commit. Kept with every report of the benchmark."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.device.libraries import gpu_here
from dmtd_runtime.errors import BackendError


def gpu_name(device_id: int) -> str | None:
    """The GPU's name; None where there is none."""
    with contextlib.suppress(BackendError):
        return gpu_here(device_id).name
    return None


def tensorrt_of(backend: BackendOptions) -> str | None:
    """The library that runs engines; the simulator's is ONNX Runtime."""
    names = {"tensorrt": ("tensorrt-cu13", "tensorrt"), "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx")}
    return version_of(*names.get(backend.backend, ()))


def version_of(*distributions: str) -> str | None:
    """Name and version of the first distribution that is installed."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return None


def commit() -> str | None:
    """The commit of the sources that run, "+" if they were changed; None where they are no checkout of git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False)

    try:
        # An installed copy may lie inside a checkout of something else: only tracked sources have a commit.
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return None
        head = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
    except OSError:
        return None
