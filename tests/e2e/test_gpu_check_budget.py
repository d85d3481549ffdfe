"""tools/gpu_check's budget: the default subset ends in time, and what it does not hold is skipped with the reason."""

from __future__ import annotations

import argparse
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tool(repo_root: Path) -> ModuleType:
    loader = SourceFileLoader("gpu_check", str(repo_root / "tools" / "gpu_check"))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def check(tool: ModuleType, out: Path, **changes: Any) -> Any:
    words = {"out": out, "work": None, "fresh": False, "rehearse": False, "full": False, "budget_s": 1, "smollm2": None}
    return tool.Check(argparse.Namespace(**{**words, **changes}))


def test_a_step_that_the_budget_does_not_hold_is_skipped(tool: ModuleType, tmp_path: Path) -> None:
    started = time.monotonic()
    one = check(tool, tmp_path)

    def many_steps() -> None:
        while True:
            one.dmtd("doctor", may_fail=True)

    with pytest.raises(tool.StepError, match=r"dmtd doctor took longer than \d s, what the budget of 1 s left it") as e:
        many_steps()
    assert e.value.skips
    assert time.monotonic() - started < 60
    assert check(tool, tmp_path, full=True).limit_s() == (900, False)


def test_results_of_another_gpu_are_not_gone_on_with(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = check(tool, tmp_path, rehearse=True)
    one.environment()
    one.results["cells"] = {"x": {"ratio": 1.0}}
    one.environment()
    assert one.results["cells"] == {"x": {"ratio": 1.0}}
    one.results["environment"]["doctor"]["gpus"] = [{"name": "another"}]
    one.environment()
    assert one.results["cells"] == {}
    assert "earlier results are of another commit or GPU" in capsys.readouterr().err
