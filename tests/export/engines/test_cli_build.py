"""`dmtd build`: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dmtd_export.cli.main import app


def dmtd(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def bundle(bundles: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli") / "bundle"
    shutil.copytree(bundles(family="llama", encoding=2, tie=True, dtype="float16"), made)
    return made


SIMULATOR = ("--backend", "simulator", "--max-model-len", "64", "--max-num-seqs", "2")


def test_dry_run_then_build_then_nothing_to_do(bundle: Path) -> None:
    seen = dmtd("build", bundle, *SIMULATOR, "--dry-run", "--json")
    assert seen.exit_code == 0, seen.output
    plan = json.loads(seen.stdout)
    assert plan["dry_run"] and not plan["exists"]
    graphs = [engine["graph"] for engine in plan["engines"]]
    assert graphs[:4] == ["thinking", "late_decode", "full_pass", "choose_token"]  # E = 2, so fused too
    assert plan["engines"][1]["profiles"] == ["prefill", "step_whole"]
    assert (plan["capacity"], plan["length_buckets"], plan["batch_buckets"]) == (320, [256, 320], [1, 2])
    assert plan["extra_bytes"] > 0  # E = 2
    built = dmtd("build", bundle, *SIMULATOR, "--json")
    assert built.exit_code == 0, built.output
    result = json.loads(built.stdout)
    assert result["built"] and result["directory"] == plan["directory"]
    assert {"engines", "peak_bytes", "seconds"} <= result.keys()
    assert all(Path(result["directory"], engine["file"]).is_file() for engine in result["engines"])
    assert f"building {len(plan['engines'])} engines for any-simulator-1: up to" in built.stderr
    again = dmtd("build", bundle, *SIMULATOR)
    assert again.exit_code == 0 and "stood there already" in again.stdout


def test_dry_run_says_what_stands_twice(bundle: Path) -> None:
    small = json.loads(dmtd("build", bundle, *SIMULATOR, "--no-fused", "--dry-run", "--json").stdout)
    assert "full_pass" not in [engine["graph"] for engine in small["engines"]]
    seen = dmtd("build", bundle, *SIMULATOR, "--fused", "--dry-run")
    assert seen.exit_code == 0, seen.output
    text = " ".join(seen.stdout.split())
    assert "full_pass" in text and "of weights stand in more than one engine" in text
    assert "attention over 256, 320 cache rows" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--max-num-seqs", 99), "error: --max-num-seqs: got 99, expected 1 to 64"),
        (("--max-model-len", 65), "error: --max-model-len: got 65, expected 2 to 64"),
        (("--compute-capability", "8.9"), "error: --compute-capability: got 8.9, but simulator builds"),
    ],
)
def test_bad_options_are_one_line(bundle: Path, words: tuple, line: str) -> None:
    done = dmtd("build", bundle, "--backend", "simulator", *words)
    assert done.exit_code == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_no_library_is_one_line_with_the_pip_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    done = dmtd("build", bundle)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert 'run: pip install "dmtd[tensorrt-rtx]"' in done.stderr


def test_what_is_no_bundle_is_one_line(tmp_path: Path) -> None:
    done = dmtd("build", tmp_path, "--backend", "simulator")
    assert done.exit_code == 1 and "has no manifest.json, so it is not a bundle" in done.stderr
    assert dmtd("build").exit_code == 2
