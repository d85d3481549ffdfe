"""The verification at the end of `dmtd build`, on the simulator; and the one line where there is nothing to run it on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import rtx
from typer.testing import CliRunner, Result

from dmtd_export.cli.main import app
from dmtd_export.engines import run as build_run
from dmtd_export.verify import built, engines_hook
from dmtd_runtime.bundle.engine_record import read_record
from dmtd_runtime.bundle.manifest import FileInfo, sha256_of
from dmtd_runtime.device.libraries import GpuFacts
from dmtd_runtime.errors import BackendError

SIMULATOR = ("--backend", "simulator", "--max-model-len", "64", "--max-num-seqs", "2")


def dmtd(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def bundle(bundles: Callable[..., Path], tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    shutil.copytree(bundles(family="llama", encoding=2, tie=True, dtype="float16"), tmp_path / "bundle")
    return tmp_path / "bundle"


def directory_of(bundle: Path) -> Path:
    [directory] = (bundle / "engines").iterdir()
    return directory


@pytest.fixture
def wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build gone wrong: the engines hold other weights than the bundle, and the record agrees with them."""
    real = build_run.copy_companions

    def altered(bundle: Path, directory: Path, manifest: Any) -> dict[str, FileInfo]:
        files = real(bundle, directory, manifest)
        path = directory / "model.onnx.data"
        content = np.fromfile(path, np.float16)
        content[len(content) // 2 : len(content) // 2 + 4000] *= -1
        content.tofile(path)
        return {**files, path.name: FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))}

    monkeypatch.setattr(build_run, "copy_companions", altered)


def test_a_build_ends_with_verification(bundle: Path) -> None:
    done = dmtd("build", bundle, *SIMULATOR, "--fused", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    found = told["verification"]
    assert found["ok"] is True and found["level"] == "oracle"
    kinds = ("step by step", "generated")
    assert [check["name"] for check in found["checks"]] == [
        f"{kind}: engines of simulator, {way}, batch {batch}"
        for way in ("staged", "fused")
        for batch in (1, 2)
        for kind in kinds
    ]
    assert all(check["cases"] > 0 for check in found["checks"])
    assert read_record(directory_of(bundle)).verification == found
    assert told["total_seconds"] > told["seconds"] > 0  # verifying counts, and is seen
    assert [line for line in done.stderr.splitlines() if line.startswith("verify: ")] == [
        f"verify: {kind}, {way}, batch {batch} ..." for way in ("staged", "fused") for batch in (2, 1) for kind in kinds
    ]
    again = dmtd("build", bundle, *SIMULATOR, "--fused")
    assert "8 checks against the float32 oracle" in again.stdout


def test_wrong_engines_do_not_take_the_place_of_those_that_stood_there(
    bundle: Path, request: pytest.FixtureRequest
) -> None:
    assert dmtd("build", bundle, *SIMULATOR, "--no-verify").exit_code == 0
    before = (directory_of(bundle) / "engine.json").read_bytes()
    request.getfixturevalue("wrong_weights")
    done = dmtd("build", bundle, *SIMULATOR, "--force")
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the engines compute something else than the model: whole cycles (standard dialect)")
    assert "batch 1" in last
    assert "nothing was kept" in last and "--no-verify" in last
    assert (directory_of(bundle) / "engine.json").read_bytes() == before


def test_no_verify_builds_alone(bundle: Path, wrong_weights: None) -> None:
    done = dmtd("build", bundle, *SIMULATOR, "--no-verify")
    assert done.exit_code == 0, done.output
    assert "not verified" not in done.stderr
    assert "no; check them with: dmtd verify" in " ".join(done.stdout.split())
    assert " s, building alone " in done.stdout
    assert read_record(directory_of(bundle)).verification == {}


def test_a_device_that_fails_does_not_cost_the_build(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **words: object) -> None:
        raise BackendError("simulator: 9.00 GB needed")

    monkeypatch.setattr(built, "verify_on_device", failing)
    done = dmtd("build", bundle, *SIMULATOR)
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: built, but verification did not run to its end: simulator: 9.00 GB needed"
    assert read_record(directory_of(bundle)).verification == {"failed": "simulator: 9.00 GB needed"}


def test_without_a_gpu_one_line_says_so(
    bundles: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx()
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles(family="llama", encoding=0, tie=True, dtype="float16"), bundle)  # two engines, not three

    def no_gpu() -> GpuFacts:
        raise BackendError("no NVIDIA driver on this machine; install one")

    monkeypatch.setattr(built, "gpu_here", no_gpu)
    done = dmtd("build", bundle, "--backend", "tensorrt-rtx", "--max-model-len", "64", "--max-num-seqs", "1")
    assert done.exit_code == 0, done.output
    [line] = [line for line in done.stderr.splitlines() if "verif" in line]
    assert line == (
        "not verified: no NVIDIA driver on this machine; where it can be done run: "
        f"dmtd verify {bundle} --backend tensorrt-rtx --max-num-seqs 1"
    )
    record = read_record(directory_of(bundle))
    assert record.verification == {"skipped": "no NVIDIA driver on this machine"}
    monkeypatch.setattr(built, "gpu_here", lambda: GpuFacts(device_id=0, name="T4", compute_capability="7.5"))
    assert engines_hook()(bundle, directory_of(bundle), record) == {
        "skipped": "the engines are for compute capability 8.0 and later, this machine's T4 has 7.5"
    }
    monkeypatch.setattr(built, "installed", lambda module: module != "torch")
    assert 'pip install "dmtd[oracle]"' in built.why_not_here(record)
