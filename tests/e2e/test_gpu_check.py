"""tools/gpu_check, rehearsed without a GPU: a step of each kind from checkpoint to report, and under ``slow`` every one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WHOLE = (
    *("tokens", "tokens", *["verify"] * 4, *["bench"] * 11),
    *("library", "build", "verify", "bench", "bench"),
)


def rehearse(repo_root: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(out / "cache")}
    command = [sys.executable, str(repo_root / "tools" / "gpu_check"), "--rehearse", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=800, check=False)


def check(out: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    results = json.loads((out / "results.json").read_text())
    steps = results["steps"]
    assert results["skipped"] == {}
    assert tuple(name.split()[0] for name in steps) == kinds
    for name, step in steps.items():
        assert step["error"] is None, name
        assert step["found"]["ok"] is True, name
        if name.startswith("bench"):
            assert step["found"]["plain_tok_per_s"] > 0, name
    assert {run["choice"] for run in steps["tokens tiny float32 batch 4"]["found"]["runs"]} == {"greedy", "sampled"}
    return results


def test_a_step_of_each_kind_and_going_on_where_it_stopped(repo_root: Path, tmp_path: Path) -> None:
    for name in ("tokens tiny float32 batch 4", "simulator"):
        done = rehearse(repo_root, tmp_path, "--only", name)
        assert done.returncode == 0, done.stderr
    check(tmp_path, ("tokens", "library", "build", "verify", "bench", "bench"))
    assert "the figures say nothing about a GPU" in done.stdout
    again = rehearse(repo_root, tmp_path, "--only", "simulator")
    assert (again.returncode, again.stderr) == (0, "")  # nothing is done twice


@pytest.mark.slow
def test_the_rehearsal_goes_all_the_way_and_resumes(repo_root: Path, tmp_path: Path) -> None:
    done = rehearse(repo_root, tmp_path)
    assert done.returncode == 0, done.stderr
    results = check(tmp_path, WHOLE)
    steps = results["steps"]
    assert steps["bench tiny float32 simulator batch 1 context 16"]["found"]["cycle_ms"] > 0
    assert "the figures say nothing about a GPU" in done.stdout
    removed = "bench tiny-ring float32 batch 2 context 16"
    before = steps.pop(removed)
    (tmp_path / "results.json").write_text(json.dumps(results))
    again = rehearse(repo_root, tmp_path)
    assert again.stderr.strip() == f"{removed} ..."  # nothing is done twice
    assert json.loads((tmp_path / "results.json").read_text())["steps"][removed].keys() == before.keys()
