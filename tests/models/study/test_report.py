"""The study's page in models/: its tables are those of the record, and it draws them; nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from study import report

NAMES = {f"d{late}-tau{cycle}" for late in (8, 16) for cycle in (2, 3, 4)}


@pytest.fixture(scope="module")
def recorded(repo_root: Path) -> dict[str, Any]:
    found = json.loads((repo_root / "models" / "study" / "results.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_page_says_what_was_recorded(recorded: dict[str, Any], repo_root: Path) -> None:
    page = (repo_root / "models" / "study" / "README.md").read_text(encoding="utf-8")
    assert report.with_tables(page, recorded) == page


def test_the_grid_was_measured_at_one_budget(recorded: dict[str, Any]) -> None:
    grid = {one["name"]: one for one in recorded["settings"] if one["name"] in NAMES}
    assert set(grid) == NAMES
    assert all(one["evaluation"] and one["bench"] for one in grid.values())
    tokens = [one["summary"]["tokens"] for one in grid.values()]
    assert max(tokens) <= 1.02 * min(tokens)


def test_a_report_is_made_anew_from_its_record(recorded: dict[str, Any], tmp_path: Path) -> None:
    report.write_report(recorded, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == recorded
    assert "| d8-tau4 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["agreement_by_phase.png", "loss_over_tokens.png", "quality_over_speed.png"]


def test_the_fit_finds_a_known_slope() -> None:
    """Divergence 5 - 0.25 ln(tokens) before the learning rate falls; the end lies 0.1 below that line."""
    from math import log

    points = [{"eval_tokens": 1000 * n, "eval_divergence": 5 - 0.25 * log(1000 * n)} for n in range(1, 11)]
    points[-1]["eval_divergence"] -= 0.1
    options = {"schedule": "warmup_stable_decay", "decay": 0.3}
    fit = report.fit_loss({"held_out": points, "summary": {"options": options}})
    assert fit["slope_per_efold"] == pytest.approx(-0.25)
    assert fit["at_ten_times"] == pytest.approx(5 - 0.25 * log(10_000) - 0.1 - 0.25 * log(10))
