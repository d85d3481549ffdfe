"""Verification of what a device computes, on the simulator: a good bundle passes, a wrong one is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dmtd_export.bundle.export import export_bundle
from dmtd_export.cli.main import app
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines
from dmtd_export.options import ExportOptions
from dmtd_export.verify import verify_on_device
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.bundle.engine_record import read_record
from dmtd_runtime.bundle.manifest import sha256_of
from dmtd_runtime.errors import BackendError

SIMULATOR = BackendOptions(backend="simulator", max_num_seqs=3, threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("on_device")
    source = write_tiny_checkpoint(root / "model", layers=4, max_positions=96)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=2, cycle_length=3, cycle_origin="absolute", prompt_input="cyclical")
    )
    export_bundle(source, root / "bundle", options)
    build_engines(root / "bundle", BuildOptions(backend="simulator", max_num_seqs=3))
    return root / "bundle"


def test_a_good_bundle_passes_step_by_step_and_in_whole_cycles(bundle: Path) -> None:
    told: list[tuple[str, int, int]] = []
    report = verify_on_device(bundle, SIMULATOR, quick=True, progress=lambda *step: told.append(step))
    assert report.ok
    assert [check.name.split(":")[0] for check in report.checks] == ["step by step", "generated"] * 2
    assert all(check.cases > 0 for check in report.checks)
    assert "whole cycles" in report.checks[1].detail
    assert " 0 whole cycles" not in report.checks[1].detail
    # A stage for each check, a step for each prompt: two in cycles and two plain.
    stages = [f"{kind}, staged, batch {batch}" for batch in (3, 1) for kind in ("step by step", "generated")]
    assert told == [(stage, done, 4) for stage in stages for done in range(5)]


def test_what_the_engines_do_not_take_is_said_before_any_work(bundle: Path) -> None:
    """Batch 1 would run; it is not worked through first."""
    begun: list[str] = []
    with pytest.raises(BackendError, match="max_num_seqs: built for up to 3, asked for 8"):
        verify_on_device(
            bundle,
            replace(SIMULATOR, max_num_seqs=8),
            quick=True,
            progress=lambda stage, done, total: begun.append(stage),
        )
    assert not begun


def test_a_wrong_engine_is_named(bundle: Path, tmp_path: Path) -> None:
    """The weights beside the engines are other ones; the record agrees with them, as after a build gone wrong."""
    shutil.copytree(bundle, tmp_path / "bundle")
    [directory] = (tmp_path / "bundle" / "engines").iterdir()
    data = directory / "model.onnx.data"
    content = np.fromfile(data, np.float32)
    data.unlink()  # a link to the bundle's
    content[len(content) // 2 : len(content) // 2 + 4000] *= -1
    content.tofile(data)
    record = read_record(directory)
    info = replace(record.files[data.name], sha256=sha256_of(data))
    (directory / "engine.json").write_text(replace(record, files={data.name: info}).to_json())
    report = verify_on_device(tmp_path / "bundle", SIMULATOR, quick=True)
    assert not report.ok
    steps, generated = report.checks[:2]
    assert "of max in the logits; dmtd mode" in steps.detail
    assert "token" in generated.detail and "expected" in generated.detail


def test_the_verb_takes_a_backend(bundle: Path) -> None:
    arguments = ["verify", str(bundle), "--backend", "simulator", "--max-num-seqs", "2", "--json"]
    result = CliRunner().invoke(app, arguments, prog_name="dmtd")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert len(report["checks"]) == 4
    result = CliRunner().invoke(app, [*arguments, "--level", "graphs"], prog_name="dmtd")
    assert result.exit_code == 2


@pytest.mark.parametrize("option", [("--max-num-seqs", "2"), ("--full-pass", "fused")])
def test_what_is_for_a_device_is_not_ignored_without_one(bundle: Path, option: tuple[str, str]) -> None:
    """It would say of engines that were never run that all is well."""
    result = CliRunner().invoke(app, ["verify", str(bundle), *option], prog_name="dmtd")
    assert result.exit_code == 2
    assert option[0] in result.output and "--backend tensorrt" in result.output
