"""What every test gets: quiet, repeatable libraries, and a skip with its reason for tests that need an NVIDIA GPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

# Before any test imports them: no look-ups on a model hub, no tokenizer threads that a fork would warn about.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that: tests send it on purpose.
signal.signal(signal.SIGINT, signal.default_int_handler)

with suppress(ImportError):  # tests marked gpu need nothing but pytest, on machines where nothing can be installed
    from hypothesis import settings

    # A shared machine stalls now and then, and a failure must be the same failure on the next run.
    settings.register_profile("dmtd", deadline=None, derandomize=True)
    settings.load_profile("dmtd")


def _has_nvidia_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True, check=False).returncode == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_nvidia_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]
