"""The log read back as one run, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmtd_models.finetune.curves import draw_curves, read_log


def training(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "tokens": 100 * step,
        "learning_rate": 1e-3,
        "tokens_per_s": 50.0,
        "divergence_by_phase": [loss, None, loss + 1],
    }


def evaluation(step: int) -> dict[str, Any]:
    by_phase = {"eval_divergence_by_phase": [1.0, 2.0, 3.0], "eval_agreement_by_phase": [0.5, None, 0.1]}
    return {"step": step, "eval_tokens": 100 * step, **by_phase}


def test_steps_done_again_after_a_restart_count_once(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    before = [training(1, 9.0), training(2, 8.0), evaluation(2), training(3, 7.5), training(4, 7.4)]
    after = [training(3, 7.0), training(4, 6.0), evaluation(4)]
    cut = json.dumps(training(5, 1.0))[:20] + "\n[1]\n"
    file.write_text("".join(json.dumps(line) + "\n" for line in before) + cut)
    with file.open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in after)
    assert read_log(file) == [training(1, 9.0), training(2, 8.0), evaluation(2), *after]


def test_a_log_is_drawn(tmp_path: Path) -> None:
    lines = [line for step in range(1, 6) for line in (training(step, 5 / step), evaluation(step))]
    draw_curves(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_evaluation_or_lines_is_drawn(tmp_path: Path) -> None:
    draw_curves([training(1, 2.0)], tmp_path / "one.png")
    draw_curves([], tmp_path / "none.png")
    assert (tmp_path / "none.png").is_file()
