"""tools/gpu_check, rehearsed on the host device: every step from checkpoint to report, and going on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def rehearse(repo_root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(out / "cache")}
    command = [sys.executable, str(repo_root / "tools" / "gpu_check"), "--rehearse", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=800, check=False)


def test_the_rehearsal_goes_all_the_way_and_resumes(repo_root: Path, tmp_path: Path) -> None:
    done = rehearse(repo_root, tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    keys = [f"tiny-float32-tau3-d2/host/batch{batch}/context16" for batch in (1, 2)]
    assert list(results["cells"]) == keys
    for cell in results["cells"].values():
        assert cell["plain_tok_per_s"] > 0
        assert cell["cycle_ms"] > 0
    assert results["verification"]["tiny-float32-tau3-d2/host"]["ok"] is True
    assert done.stdout.count("| tiny-float32-tau3-d2/host") == 3
    assert "the figures say nothing about a GPU" in done.stdout
    before = results["cells"].pop(keys[1])
    (tmp_path / "results.json").write_text(json.dumps(results))
    again = rehearse(repo_root, tmp_path)
    assert again.stderr.strip() == f"{keys[1]} ..."  # nothing is measured twice
    assert json.loads((tmp_path / "results.json").read_text())["cells"][keys[1]].keys() == before.keys()
