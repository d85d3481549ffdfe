"""tools/export_memory at a small shape: it measures, it can fail, it cleans up. At full size under ``slow``."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

SMALL = ("--layers", "2", "--scale", "16")


@pytest.fixture
def script(repo_root: Path) -> Path:
    return repo_root / "tools/export_memory"


def run(script: Path, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, "--directory", directory, *options], capture_output=True, text=True, check=False
    )


def test_json_of_a_small_export(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # Embedding, 2 layers, norms: all counted by hand from the shapes at scale 16 (hidden 160, MLP 608, vocabulary 9496).
    layer = 2 * 160 + 2 * 128 + (2 + 1 + 1 + 2) * 128 * 160 + 3 * 608 * 160
    assert result["checkpoint_bytes"] == 2 * (9496 * 160 + 2 * layer + 160)
    assert result["bundle_bytes"] > result["checkpoint_bytes"]
    assert 30e6 < result["peak_anon_bytes"] < 400e6
    assert result["peak_rss_bytes"] >= result["peak_anon_bytes"]
    assert result["samples"] > 10 and result["ok"] is True
    assert not list(tmp_path.iterdir())


def test_table_and_limit(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path, *SMALL, "--limit-gb", "0.01")
    assert done.returncode == 1
    assert "peak RssAnon: got 0." in done.stderr and "expected at most 0.01 GB" in done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "checkpoint",
        "bundle",
        "export",
        "peak RssAnon",
        "peak RSS",
    ]
    assert not list(tmp_path.iterdir())


def test_the_sampler_sees_what_a_child_allocates(script: Path) -> None:
    tool = _load(script)
    hold = "import time; block = bytearray(b'x') * 300_000_000; time.sleep(0.2)"
    result = tool.run_sampled([sys.executable, "-c", hold])
    assert 300e6 < result["peak_anon_bytes"] < 400e6


def test_a_failed_export_is_told(script: Path) -> None:
    with pytest.raises(SystemExit, match="the export ended with status 3"):
        _load(script).run_sampled([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.slow
def test_full_size(script: Path, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip("needs 20 GB of disk")
    done = run(script, tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 8.0e9 < result["checkpoint_bytes"] < 8.1e9
    assert result["peak_anon_bytes"] < 3e9


def _load(script: Path) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader("export_memory", str(script))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
