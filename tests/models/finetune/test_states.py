"""Which saved states are whole."""

from __future__ import annotations

import json
from pathlib import Path

from dmtd_models.finetune.states import file_sizes, latest_checkpoint, remove_states


def state(directory: Path, step: int) -> Path:
    made = directory / f"checkpoint-{step}"
    made.mkdir()
    for name, size in (("model.safetensors", 40), ("optimizer.pt", 30), ("rng_state_0.pth", 5)):
        (made / name).write_bytes(b"x" * size)
    (made / "complete.json").write_text(json.dumps({"step": step, "bytes": file_sizes(made)}))
    return made


def test_a_state_that_a_crash_emptied_is_passed_over(tmp_path: Path) -> None:
    first, second, third = (state(tmp_path, step) for step in (9, 10, 11))
    assert json.loads((third / "complete.json").read_text())["bytes"] == {"model.safetensors": 40, "optimizer.pt": 30}
    assert latest_checkpoint(tmp_path) == third
    (third / "optimizer.pt").write_bytes(b"")
    assert latest_checkpoint(tmp_path) == second
    (second / "complete.json").write_text("")
    assert latest_checkpoint(tmp_path) == first
    (first / "model.safetensors").unlink()
    assert latest_checkpoint(tmp_path) is None


def test_random_states_of_other_processes_are_no_condition(tmp_path: Path) -> None:
    made = state(tmp_path, 3)
    (made / "rng_state_0.pth").write_bytes(b"longer than before")
    assert latest_checkpoint(tmp_path) == made


def test_states_of_earlier_versions_record_no_sizes(tmp_path: Path) -> None:
    made = state(tmp_path, 3)
    (made / "complete.json").write_text(json.dumps({"step": 3, "tokens": 7}))
    assert latest_checkpoint(tmp_path) == made


def test_broken_states_go_and_whole_ones_stay(tmp_path: Path) -> None:
    whole, broken = state(tmp_path, 3), state(tmp_path, 4)
    (broken / "model.safetensors").write_bytes(b"")
    remove_states(tmp_path, keep=2)
    assert whole.is_dir() and not broken.exists()
