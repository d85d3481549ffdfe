"""Runs a program that a model wrote, in a process of its own with limits on time, memory and file size.

Only tasks that were asked for with ``allow_code_execution`` come here. The limits stop accidents (endless loops, memory,
large files, leftover children); they are **no sandbox**: the program has this user's rights and network. Run untrusted
models in a container.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Limits are set inside the child, before the program: a function run between fork and exec is unsafe with threads.
_LAUNCH = """
import resource, runpy, sys
seconds, memory, size = map(int, sys.argv[2:5])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """What a program may use."""

    cpu_seconds: int = 10
    wall_seconds: float = 60.0
    """Generous: on a busy machine a good program waits for its turn."""
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


def runs_to_its_end(program: str, limits: RunLimits) -> bool:
    """Whether a program ends without an error within its limits, and by reaching its last line.

    Leaving early (``sys.exit(0)`` in a tested function) is not reaching the end.
    """
    proof = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="dmtd-code-") as name:
        work = Path(name)
        source, mark = work / "program.py", work / proof
        ending = f"\n__import__('pathlib').Path({str(mark)!r}).write_text({proof!r})\n"
        source.write_text(program + ending, encoding="utf-8")
        numbers = (limits.cpu_seconds, limits.memory_bytes, limits.file_bytes)
        command = [sys.executable, "-I", "-c", _LAUNCH, str(source), *map(str, numbers)]
        process = subprocess.Popen(
            command,
            cwd=work,
            env={"PATH": os.defpath, "HOME": name, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=limits.wall_seconds)
        finally:
            _kill_group(process)
        return process.returncode == 0 and mark.is_file() and mark.read_text(encoding="utf-8") == proof


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the program and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
