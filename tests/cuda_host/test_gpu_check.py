"""tools/gpu_check, rehearsed over the stand-ins: every step of a check on a GPU, with the real provider."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda_host


def test_every_step_runs_and_what_stand_ins_get_wrong_is_no_failure(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repo_root / "tools" / "gpu_check"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    results = json.loads((tmp_path / "results.json").read_text())
    broken = {name: step["error"] for name, step in results["steps"].items() if step["error"] is not None}
    assert broken == {}
    assert done.returncode == 0, done.stderr[-2000:]
    assert (results["environment"]["device"], results["computes"]) == ("cuda", False)
    assert results["copy_bytes_per_s"] > 0
    assert all(name.startswith("verify") for name in results["skipped"]), results["skipped"]  # there is no PyTorch here
    for dtype in ("float16", "bfloat16"):
        for batch in (1, 4):
            step = results["steps"][f"tokens tiny {dtype} batch {batch}"]
            assert len(step["found"]["runs"]) == 8
            assert all(run["repeats"] for run in step["found"]["runs"])
    assert "differs, as stand-ins must" in done.stdout
