"""The heap of a long run: in a process of its own, since what the C library is told holds for all of one."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_support import run_options, run_tiny, write_base

from dmtd_models.finetune import heap, trainer

# Blocks of 64 KB; every other one freed leaves holes that glibc keeps by itself.
SCRIPT = """
import ctypes, json, pathlib
from dmtd_models.finetune.heap import give_back, keep_large_blocks

def resident():
    return 4096 * int(pathlib.Path("/proc/self/statm").read_text().split()[1])

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
told = keep_large_blocks()
blocks = [libc.malloc(1 << 16) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 16)
full = resident()
for block in blocks[::2]:
    libc.free(block)
kept = resident()
print(json.dumps([told, give_back(), full - kept, kept - resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_holes_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    told, gave, at_free, at_trim = json.loads(done.stdout)
    assert told and gave
    assert abs(at_free) < 10e6, "freed blocks were meant to stay"
    assert at_trim > 40e6, "1000 holes of 64 KB less their first and last pages"


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not heap.keep_large_blocks() and not heap.give_back()


def test_a_run_gives_back_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(trainer, "give_back", lambda: calls.append(1))
    monkeypatch.setattr(trainer, "GIVE_BACK_EVERY_STEPS", 2)
    result = run_tiny(write_base(tmp_path / "base"), tmp_path / "run", run_options())
    assert result.steps >= 4 and len(calls) == result.steps // 2
