"""How tools/gpu_check goes through its steps: one that crashes, hangs or diverges costs itself, and the budget is kept.

Steps are done by a stand-in of tools/gpu_step.py here, which does what their options say.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

STAND_IN = """
import json, os, signal, sys, time
step, path = json.load(open(sys.argv[1])), sys.argv[2]
options = step["options"]
def save(**result):
    with open(path, "w") as file:
        json.dump({"found": None, "error": None, "skipped": None, **result}, file)
save(error="it ended before its work was done", found=options.get("partly"))
if options.get("crash"):
    os.kill(os.getpid(), signal.SIGSEGV)
time.sleep(options.get("sleep", 0))
save(found=options.get("found", {"ok": True}), error=options.get("error"), skipped=options.get("skipped"))
"""


@pytest.fixture(scope="module")
def tool(repo_root: Path) -> ModuleType:
    """tools/gpu_check, which puts its folder on the path: its parts can then be imported by name."""
    loader = SourceFileLoader("gpu_check", str(repo_root / "tools" / "gpu_check"))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def check(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a check of the given steps."""
    root = tmp_path / "repo"
    (root / "tools").mkdir(parents=True)
    (root / "tools" / "gpu_step.py").write_text(STAND_IN)
    monkeypatch.setattr(tool, "REPO", root)
    monkeypatch.setattr(tool, "commit", lambda: "abc")

    def make(*steps: Any, **changes: Any) -> Any:
        words = {"out": tmp_path / "out", "work": None, "fresh": False, "rehearse": False, "full": False}
        words |= {"budget_s": 100, "smollm2": None, "only": None, **changes}
        monkeypatch.setattr(tool, "check_steps", lambda: list(steps))
        return tool.Check(argparse.Namespace(**words))

    return make


def step(tool: ModuleType, name: str, do: str = "bench", limit_s: float = 60, after: str | None = None, **options: Any):
    return tool.Step(name=name, do=do, limit_s=limit_s, after=after, options=options)


def test_a_crash_costs_its_step_and_keeps_what_was_found(tool: ModuleType, check: Any) -> None:
    one = check(step(tool, "tokens", do="tokens", crash=True, partly={"runs": []}), step(tool, "after it"))
    assert one.run() is False
    crashed, other = one.results["steps"].values()
    assert crashed["error"] == "its process ended with SIGSEGV; see tokens.log"
    assert crashed["found"] == {"runs": []}
    assert other["error"] is None
    assert "BROKEN" in (one.out / "report.md").read_text()


def test_a_failed_verification_is_a_result_and_what_follows_is_measured(tool: ModuleType, check: Any) -> None:
    failed = {"ok": False, "checks": [], "diagnosis": "step by step, step 3: after the first step: cache or lengths"}
    steps = (step(tool, "verify x", do="verify", found=failed), step(tool, "bench x", after="verify x"))
    one = check(*steps)
    assert one.run() is False
    assert one.results["steps"]["bench x"]["found"]["ok"] is True
    assert "| verify x | FAILED | 0 | step by step, step 3" in (one.out / "report.md").read_text()
    again = check(*steps)
    assert [each for each in steps if not again.is_done(each)] == []  # it is not verified twice


def test_what_broke_is_done_again_and_what_comes_after_it_waits(
    tool: ModuleType, check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    follower = step(tool, "bench", after="build")
    one = check(step(tool, "build", do="build", error="no memory"), follower)
    one.run()
    assert one.results["skipped"] == {"bench": "build did not go well"}
    again = check(step(tool, "build", do="build"), follower)
    assert again.run() is True
    assert list(again.results["steps"]) == ["build", "bench"]
    assert "build: no memory" in capsys.readouterr().err


def test_what_cannot_be_done_here_is_no_failure(tool: ModuleType, check: Any) -> None:
    one = check(step(tool, "provider", do="provider", skipped="no CUDA provider"), step(tool, "x", after="provider"))
    assert one.run() is True
    assert one.results["skipped"] == {"provider": "no CUDA provider", "x": "provider did not go well"}


def test_a_step_that_hangs_ends_at_its_limit(tool: ModuleType, check: Any) -> None:
    one = check(step(tool, "hangs", limit_s=1, sleep=3600), step(tool, "after it"))
    started = time.monotonic()
    one.run()
    assert time.monotonic() - started < 600
    assert one.results["steps"]["hangs"]["error"] == "took longer than 1 s"
    assert one.results["steps"]["after it"]["error"] is None


def test_what_the_budget_does_not_hold_is_skipped_with_the_reason(tool: ModuleType, check: Any) -> None:
    one = check(step(tool, "long", sleep=3600), step(tool, "late"), budget_s=5)
    started = time.monotonic()
    one.run()
    assert time.monotonic() - started < 600
    error = one.results["steps"]["long"]["error"]
    assert error.endswith("what the budget of 5 s left it; --budget-s raises it")
    assert one.results["skipped"] == {"late": "the budget of 5 s was used up; --budget-s raises it"}


def test_wrong_numbers_of_stand_in_kernels_are_recorded_and_no_failure(tool: ModuleType, check: Any) -> None:
    provider = step(tool, "provider", do="provider", found={"ok": True, "computes": False})
    wrong = {"found": {"ok": False, "runs": []}}
    one = check(provider, step(tool, "tokens a", do="tokens", device="cuda", **wrong))
    assert one.run() is True
    report = (one.out / "report.md").read_text()
    assert "differs, as stand-ins must" in report
    assert "stand-ins that compute nothing" in report
    # What another device computes counts all the same.
    other = check(provider, step(tool, "tokens b", do="tokens", device="cpu", **wrong))
    assert other.run() is False


def test_results_of_another_gpu_are_not_gone_on_with(
    tool: ModuleType, check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one = check(step(tool, "x"))
    one.run()
    results = json.loads(one.path.read_text())
    results["environment"]["doctor"]["gpus"] = [{"name": "another", "memory_mib": 1}]
    one.path.write_text(json.dumps(results))
    again = check(step(tool, "x"))
    again.environment()
    assert again.results["steps"] == {}
    assert "earlier results are of another commit or device" in capsys.readouterr().err


def test_chosen_steps_bring_what_they_come_after(tool: ModuleType, check: Any) -> None:
    steps = [step(tool, "provider"), step(tool, "build", after="provider"), step(tool, "other")]
    one = check(*steps, step(tool, "verify", after="build"), only="verify")
    assert [each.name for each in one.steps()] == ["provider", "build", "verify"]


def test_the_order_is_that_of_worth_and_every_step_can_be_done(tool: ModuleType) -> None:
    order, work, shapes = (import_module(f"gpu_{name}") for name in ("order", "step", "bundles"))
    kinds = [each.do for each in order.check_steps() if each.after in (None, "provider") and each.do != "library"]
    quantised = ["verify", "bench", "bench"]
    benches = [*["bench"] * 4, *quantised * 2, *["bench"] * 7]
    assert kinds == ["provider", "bandwidth", *["tokens"] * 4, *["verify"] * 4, *benches]
    for steps in (
        order.check_steps(),
        order.matrix_steps(),
        order.rehearsal_steps("cuda"),
        order.rehearsal_steps("cpu", real_small=True),
    ):
        names = [each.name for each in steps]
        assert len(set(names)) == len(names)
        for place, each in enumerate(steps):
            assert each.do in work.STEPS, each
            assert each.after is None or each.after in names[:place], each
            assert all(bundle.shape in shapes.SHAPES for bundle in each.bundles), each
    # A check over a rehearsal: the same steps on other models.
    over_stand_ins = [each for each in order.rehearsal_steps("cuda") if "simulator" not in each.name]
    assert [each.do for each in over_stand_ins] == kinds


@pytest.mark.parametrize(
    ("checks", "told"),
    [
        ([("step by step: x, batch 1", None, None), ("step by step: x, batch 4", None, None)], None),
        (
            [("step by step: x, batch 1", 8, "0.5 of max in the logits; dmtd mode, prompt of 9, staged, batch 1")],
            "step by step, step 0: at the first step: layout",
        ),
        (
            [("step by step: x, batch 1", 11, "token; dmtd mode, prompt of 9, staged, batch 1")],
            "step by step, step 3: after the first step: cache or lengths",
        ),
        (
            [
                ("step by step: x, batch 1", None, None),
                (
                    "generated: x, batch 4",
                    None,
                    "top-1 agreement 3/9; plain mode, prompt of 9, token 2: expected 1, got 5",
                ),
            ],
            "generated, step 2: only at batch 4: what stands between sequences",
        ),
        ([("step by step: x, batch 1", None, "top-1 agreement with float32")], "step by step, step ?: no step named"),
    ],
)
def test_the_first_diverging_step_is_named_with_what_it_speaks_for(
    tool: ModuleType, checks: list[tuple[str, int | None, str | None]], told: str | None
) -> None:
    found = import_module("gpu_step").diagnosis(
        [
            {"name": name, "ok": detail is None, "detail": detail, "divergence": {"position": position}}
            for name, position, detail in checks
        ]
    )
    assert found == told if told is None else found.startswith(told)


def test_a_ratio_above_the_bound_is_called_launch_bound(tool: ModuleType) -> None:
    summary = import_module("gpu_report").bench_summary
    measured = {"ratio": 2.0, "plain_gb_per_s": 1000.0, "dmtd_gb_per_s": 500.0}
    kept = summary({**measured, "ratio_of_bound": 1.3}, 4e12)
    assert (kept["note"], kept["plain_share_of_copies"], kept["dmtd_share_of_copies"]) == ("launch-bound", 0.25, 0.125)
    kept = summary({**measured, "ratio_of_bound": 0.9}, None)
    assert "note" not in kept
    assert kept["dmtd_share_of_copies"] is None
