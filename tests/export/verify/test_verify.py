"""Verification's interface: levels and what lowers them, the report and its record, the export hook, conventions."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_mutations import edit_weight, edited_graph, nodes_of, reseal, set_attribute
from rich.console import Console

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_export.verify import (
    VerificationError,
    VerifyOptions,
    VerifyReport,
    levels,
    record,
    render,
    verify_bundle,
    verify_hook,
)
from dmtd_export.verify.cycles import Case, Comparison, Variant, make_cases, make_variants
from dmtd_export.verify.forced import LeavingRun
from dmtd_export.verify.margins import FLOAT32, Margin, top_two_gap, worst_difference
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import Rope, SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.errors import BundleError

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=2), max_num_seqs=2, max_model_len=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("verify") / "model", family="llama", layers=3)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    export_bundle(checkpoint, checkpoint.parent / "bundle", OPTIONS)
    return checkpoint.parent / "bundle"


def text_of(report: VerifyReport) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(render(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_hint_in_brackets_is_shown_as_it_is() -> None:
    note = 'PyTorch is not installed; pip install "dmtd[oracle]"'
    shown = text_of(VerifyReport(level="graphs", checks=(), level_note=note))
    assert note in " ".join(shown.split())


# --- what passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "encoding", "tau", "origin", "prompt_input", "extra"),
    [
        ("qwen3", 2, 4, "absolute", "cyclical", {"tie": True}),
        ("qwen2", 0, 1, "prompt", "thinking", {"rope": Rope(theta=5000.0, kind="linear", factor=2.0)}),
        ("llama", 1, 6, "prompt", "sum", {"qkv_bias": True, "mlp_bias": True}),
    ],
)
def test_every_family_and_convention_passes(
    tmp_path: Path, family: str, encoding: int, tau: int, origin: Any, prompt_input: Any, extra: dict[str, Any]
) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", family=family, layers=4, **extra)
    options = ExportOptions(
        split=SplitOptions(
            encoding_layers=encoding,
            decoding_layers=1,
            cycle_length=tau,
            cycle_origin=origin,
            prompt_input=prompt_input,
        ),
        max_num_seqs=3,
    )
    reports: list[VerifyReport] = []
    export_bundle(model, tmp_path / "b", options, verify=verify_hook(VerifyOptions(), on_report=reports.append))
    (report,) = reports
    assert report.ok
    assert report.level == "oracle"
    assert report.level_note == ""
    kept = load_manifest(tmp_path / "b").verification
    assert kept["ok"] is True
    assert kept["level"] == "oracle"
    assert kept["margins"]["float32_of_max"] == 2e-5
    assert {check["name"] for check in kept["checks"]} == {check.name for check in report.checks}


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_bundle_of_one_dialect_passes(checkpoint: Path, tmp_path: Path, target: Any) -> None:
    options = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=2), target=target, max_num_seqs=1)
    export_bundle(checkpoint, tmp_path / "b", options)
    for level in ("graphs", "oracle"):
        assert verify_bundle(tmp_path / "b", level=level, quick=True).ok


def test_the_cases_stand_around_multiples_of_the_cycle_length(bundle: Path) -> None:
    cases = make_cases(load_manifest(bundle), quick=False)
    assert {len(case.prompt) for case in cases} == {1, 2, 3, 4, 8}
    assert {case.plain for case in cases} == {False, True}
    assert all(case.num_new == 5 for case in cases)
    variants = make_variants(load_manifest(bundle), quick=False)
    assert {(v.dialect, v.full_pass) for v in variants} == {
        ("onnxruntime", None),
        *((dialect, mode) for dialect in ("standard", "onnxruntime") for mode in ("staged", "fused")),
    }
    assert any(v.chunk < 8 for v in variants)
    assert any(v.batch > 1 for v in variants)


def test_some_cases_leave_their_cycles(bundle: Path) -> None:
    """Heads by the oracle's own rule: no cycle is longer than the bundle's, and each that is shorter was left."""
    manifest = load_manifest(bundle)
    for quick in (False, True):
        cases = [case for case in make_cases(manifest, quick) if case.leaves]
        assert len(cases) == (1 if quick else 2)
        for case in cases:
            assert case.heads is not None
            gaps = np.diff(case.heads)
            assert case.heads[0] == len(case.prompt)
            assert (gaps <= manifest.cycle.cycle_length).all()
            left = [at for at, gap in zip(case.heads[1:], gaps, strict=True) if gap < manifest.cycle.cycle_length]
            assert [at for at in case.leaves if at in case.heads] == left
            assert left[0] < len(case.prompt) + case.num_new - 1
    absolute = replace(manifest, cycle=replace(manifest.cycle, cycle_origin="absolute", prompt_input="cyclical"))
    assert not any(case.leaves for case in make_cases(absolute, quick=False))


@pytest.fixture(scope="module")
def longer(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose cycles have late steps that others follow."""
    directory = tmp_path_factory.mktemp("longer") / "bundle"
    export_bundle(checkpoint, directory, replace(OPTIONS, split=SplitOptions(decoding_layers=1, cycle_length=3)))
    return directory


def test_both_ways_to_leave_a_cycle_are_taken(longer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged, judge = set[str](), LeavingRun.judge

    def noted(self: LeavingRun, confidence: float) -> str:
        judged.add(found := judge(self, confidence))
        return found

    monkeypatch.setattr(LeavingRun, "judge", noted)
    assert verify_bundle(longer, level="oracle", quick=True).ok
    assert judged == {"keep", "leave", "drop"}


@pytest.mark.parametrize("blind_to", ["leave", "drop"])
def test_a_cycle_that_is_not_left_is_found(blind_to: str, longer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = LeavingRun.judge

    def wrong(self: LeavingRun, confidence: float) -> str:
        return "keep" if (found := judge(self, confidence)) == blind_to else found

    monkeypatch.setattr(LeavingRun, "judge", wrong)
    report = verify_bundle(longer, level="oracle", quick=True)
    assert not report.ok
    assert any("adaptive mode" in str(check) for check in report.checks)


def test_a_model_of_very_few_positions_can_be_verified(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=4), max_num_seqs=2, max_model_len=3)
    export_bundle(checkpoint, tmp_path / "b", options)
    assert verify_bundle(tmp_path / "b").ok


# --- levels --------------------------------------------------------------------------------------------------------


def test_a_level_that_is_asked_for_is_not_exceeded(bundle: Path) -> None:
    report = verify_bundle(bundle, level="structure")
    assert report.ok
    assert {check.level for check in report.checks} == {"structure"}
    assert "as asked" in report.level_note


@pytest.mark.parametrize(
    ("missing", "level", "words"),
    [("torch", "graphs", "PyTorch is not installed"), ("onnxruntime", "structure", "ONNX Runtime is not installed")],
)
def test_a_missing_library_lowers_the_level_with_one_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, missing: str, level: str, words: str
) -> None:
    monkeypatch.setattr(levels, "installed", lambda module: module != missing)
    report = verify_bundle(bundle, quick=True)
    assert report.ok
    assert report.level == level
    assert words in report.level_note
    assert "pip install" in report.level_note
    assert "\n" not in report.level_note
    assert words in text_of(report).replace("\n", " ")


def test_too_little_memory_lowers_the_level(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "available_bytes", lambda: 1 << 20)
    report = verify_bundle(bundle, quick=True)
    assert report.level == "structure"
    assert "memory" in report.level_note


def test_scarce_memory_runs_the_whole_cycles_without_copies(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(bundle)
    enough = levels.least_bytes(manifest) + levels.float32_bytes(manifest)
    monkeypatch.setattr(levels, "available_bytes", lambda: enough)
    report = verify_bundle(bundle, quick=True)
    assert report.level == "oracle"
    assert report.ok
    assert any("page cache" in note for note in report.notes)
    assert any("whole cycles" in check.name for check in report.checks)
    monkeypatch.setattr(levels, "available_bytes", lambda: enough - 1)
    report = verify_bundle(bundle, quick=True)
    assert report.level == "oracle"
    assert any("whole cycles were not run" in note for note in report.notes)
    assert not any("whole cycles" in check.name for check in report.checks)


def test_a_large_model_runs_fewer_cycles_and_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        return sum("whole cycles" in check.name for check in verify_bundle(bundle).checks)

    every = count()
    monkeypatch.setattr(levels, "LARGE_BYTES", 0)
    assert 0 < count() < every
    assert any("large" in note for note in verify_bundle(bundle).notes)


def test_a_bundle_without_its_config_needs_the_checkpoint_for_the_oracle(checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint, tmp_path / "b", OPTIONS)
    (tmp_path / "b" / "config.json").unlink()
    path = tmp_path / "b" / "manifest.json"
    raw = json.loads(path.read_text())
    del raw["files"]["config.json"]
    path.write_text(json.dumps(raw))
    report = verify_bundle(tmp_path / "b", quick=True)
    assert report.level == "graphs"
    assert "--checkpoint" in report.level_note
    with open_checkpoint(checkpoint) as source:
        assert verify_bundle(tmp_path / "b", checkpoint=source, quick=True).level == "oracle"


def test_the_structure_level_needs_neither_torch_nor_onnxruntime(bundle: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path\n"
        "from dmtd_export.verify import verify_bundle\n"
        "report = verify_bundle(Path(sys.argv[1]), level='structure')\n"
        "assert report.ok, report\n"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, timeout=60)


# --- report --------------------------------------------------------------------------------------------------------


def test_the_json_has_what_it_promises(bundle: Path) -> None:
    report = verify_bundle(bundle, quick=True)
    raw = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert raw["ok"] is True
    assert raw["level"] == "oracle"
    assert raw["first_divergence"] is None
    assert raw["near_ties"] == 0
    for check in raw["checks"]:
        assert {"name", "level", "ok", "worst", "margin", "unit", "cases", "detail"} <= check.keys()
    assert json.loads(json.dumps(record(report)))["ok"] is True


def test_stages_are_told_and_end_complete(bundle: Path) -> None:
    told: list[tuple[str, int, int]] = []
    verify_bundle(bundle, quick=True, progress=lambda *stage: told.append(stage))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["structure", "reference", "graphs", "cycles"]
    last = {stage: (done, total) for stage, done, total in told}
    assert all(done == total for done, total in last.values())
    assert all(0 <= done <= total for _, done, total in told)
    for name, (_, total) in last.items():  # counted to the end in small steps, not set to it
        steps = [done for stage, done, _ in told if stage == name][:-1]
        assert steps[-1] == total
        assert max(after - before for before, after in pairwise(steps)) <= max(3, total / 4)


def test_the_table_names_the_first_divergence(checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint, tmp_path / "b", OPTIONS)
    edit_weight(tmp_path / "b", "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.__setitem__((0, 0), 9.0))
    reseal(tmp_path / "b")
    report = verify_bundle(tmp_path / "b")
    text = text_of(report)
    assert "FAILED" in text
    assert "model.layers.1.mlp.up_proj.weight" in text
    raw = report.to_json()
    assert raw["ok"] is False
    assert raw["first_divergence"]["layer"] == 1


def test_a_value_that_is_not_finite_is_a_divergence_and_still_json(checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint, tmp_path / "b", OPTIONS)
    with edited_graph(tmp_path / "b", "late_decode.onnx") as model:
        for node in nodes_of(model, "RMSNormalization"):
            set_attribute(node, "epsilon", float("nan"))
    reseal(tmp_path / "b")
    report = verify_bundle(tmp_path / "b", quick=True)
    assert not report.ok
    json.dumps(report.to_json(), allow_nan=False)


def test_a_directory_that_is_no_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no manifest"):
        verify_bundle(tmp_path)


def test_another_models_checkpoint_is_told_apart(bundle: Path, tmp_path: Path) -> None:
    with open_checkpoint(write_tiny_checkpoint(tmp_path / "other", family="llama", layers=4)) as source:
        report = verify_bundle(bundle, checkpoint=source)
    assert report.first_divergence is not None
    assert "num_layers 3, the checkpoint has 4" in report.first_divergence.detail
    with open_checkpoint(write_tiny_checkpoint(tmp_path / "seed", family="llama", layers=3, seed=1)) as source:
        report = verify_bundle(bundle, checkpoint=source, level="structure")
    assert report.first_divergence is not None
    assert "model.embed_tokens.weight is not the checkpoint's tensor" in report.first_divergence.detail


# --- the export hook -----------------------------------------------------------------------------------------------


def test_a_failed_verification_keeps_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    hook = verify_hook(VerifyOptions(quick=True))

    def spoil_and_verify(work: Path, source: Any) -> Any:
        edit_weight(work, "lm_head.weight", lambda tensor: tensor.__setitem__((0, 0), 9.0))
        reseal(work)
        return hook(work, source)

    with pytest.raises(VerificationError, match=r"lm_head\.weight.*--no-verify"):
        export_bundle(checkpoint, tmp_path / "b", OPTIONS, verify=spoil_and_verify)
    assert not (tmp_path / "b").exists()


# --- margins -------------------------------------------------------------------------------------------------------


def comparison(margin: Margin, expected: list[float], got: list[float]) -> Any:
    variant = Variant(dialect="standard", full_pass="staged", batch=1, chunk=1)
    found = Comparison(variant=variant, margin=margin)
    found.add(Case(prompt=(1,), plain=False, num_new=1), np.array([expected], np.float32), np.array([got], np.float32))
    return found.check("x", "oracle")


def test_near_ties_are_counted_and_no_failure() -> None:
    check = comparison(FLOAT32, [1.0, 1.00001], [1.00001, 1.0])
    assert check.ok
    assert check.near_ties == 1
    assert "near-ties" in check.detail


def test_another_token_beyond_the_margin_is_a_failure() -> None:
    check = comparison(FLOAT32, [1.0, 1.00003], [1.0, 1.0])
    assert not check.ok
    assert check.near_ties == 0


def test_logits_beyond_the_margin_are_a_failure() -> None:
    assert comparison(FLOAT32, [1.0, 0.0], [1.0, 1.9e-5]).ok
    assert not comparison(FLOAT32, [1.0, 0.0], [1.0, 2.1e-5]).ok
    assert not comparison(FLOAT32, [1.0, 0.0], [1.0, float("nan")]).ok


def test_ulp_are_of_the_type_at_the_largest_value() -> None:
    margin = Margin(limit=1.0, unit="ULP of float16", ulp_bits=10)
    wanted, got = np.array([3.0, 0.0]), np.array([3.0, 2.0**-9])
    assert worst_difference(wanted, got, margin).error == pytest.approx(1.0)  # float16 steps by 2**-9 between 2 and 4
    assert float(np.spacing(np.float16(3.0))) == 2.0**-9


def test_the_gap_of_the_top_two() -> None:
    assert top_two_gap(np.array([1.0, 5.0, 4.5])) == 0.5
