"""The end of a build where there is a GPU: kernels are compiled and kept. Over the stand-ins of CUDA and TensorRT-RTX."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from engine_support import make_bundle
from fake_cuda import FakeCuda, FakeRtx, RuntimeCache, install_fakes
from typer.testing import CliRunner

from dmtd_export.cli.main import app
from dmtd_export.engines import warm_up
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines
from dmtd_export.engines.warm_up import compiles_here, warm_up_engines
from dmtd_runtime.backends.engines.backend import BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bundle.engine_record import EngineRecord, read_record
from dmtd_runtime.bundle.opening import open_bundle


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install_fakes(monkeypatch)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_bundle(tmp_path_factory.mktemp("build_warm_up"), encoding=1, dtype="float32")
    build_engines(made, BuildOptions(backend="simulator", fused=True, max_num_seqs=2, max_model_len=64))
    return made


@pytest.fixture
def as_rtx(built: Path, tmp_path: Path) -> tuple[Path, Path, EngineRecord]:
    """The simulator's engines, said to be TensorRT-RTX's: bundle, directory, record."""
    bundle = shutil.copytree(built, tmp_path / "bundle")
    [directory] = (bundle / "engines").iterdir()
    record = replace(read_record(directory), backend="tensorrt-rtx", version=FakeRtx.__version__, supported=("8.9",))
    (directory / "engine.json").write_text(record.to_json())
    return bundle, directory, record


def test_only_what_compiles_at_run_time_is_warmed_up(fake: FakeCuda, as_rtx: tuple[Path, Path, EngineRecord]) -> None:
    record = as_rtx[2]
    assert compiles_here(record)
    assert not compiles_here(replace(record, backend="simulator"))
    assert not compiles_here(replace(record, backend="tensorrt"))
    fake.capability = (7, 5)
    assert not compiles_here(record)
    fake.driver = 0
    assert not compiles_here(record)


def test_kernels_of_every_engine_are_kept_and_read_by_the_next_one(
    fake: FakeCuda, as_rtx: tuple[Path, Path, EngineRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(RuntimeCache, "read", [])
    bundle, directory, record = as_rtx
    assert warm_up_engines(bundle, directory, record) == ""
    assert fake.host.stalled_s > 100
    assert len(list((tmp_path / "cache" / "dmtd" / "kernels").iterdir())) == len(record.engines) == 5
    RuntimeCache.read.clear()
    open_backend(bundle, open_bundle(bundle), BackendOptions(backend="tensorrt-rtx")).close()
    assert RuntimeCache.read == [b"kernels"] * 4  # thinking is not loaded where full passes are fused


def test_what_does_not_fit_is_told_in_one_line(fake: FakeCuda, as_rtx: tuple[Path, Path, EngineRecord]) -> None:
    fake.host._total = 1000
    assert "GB needed" in warm_up_engines(*as_rtx)


def test_a_build_ends_with_it_once(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    calls: list[tuple[Path, Path, int]] = []

    def noted(bundle: Path, directory: Path, record: EngineRecord) -> str:
        assert read_record(directory) == record  # in their place
        calls.append((bundle, directory, record.max_num_seqs))
        return "no room"

    monkeypatch.setattr(warm_up, "compiles_here", lambda record: True)
    monkeypatch.setattr(warm_up, "warm_up_engines", noted)
    command = ("build", str(bundle), "--backend", "simulator", "--max-num-seqs", "1", "--no-verify", "--json")
    first, again = (CliRunner().invoke(app, command, prog_name="dmtd") for _ in range(2))
    assert (first.exit_code, again.exit_code) == (0, 0), first.output
    assert calls == [(bundle, Path(json.loads(first.stdout)["directory"]), 1)]
    assert "kernels are compiled when the engines first run, not now: no room" in first.stderr
    assert "kernels" not in again.stderr
    done = CliRunner().invoke(app, [*command, "--force", "--no-warm-up"], prog_name="dmtd")
    assert done.exit_code == 0 and len(calls) == 1
