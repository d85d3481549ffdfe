"""Local tasks are files: how many items are taken, and what a name is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.tasks import read_task


def test_the_first_items_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"prompt": "{n}", "choices": ["a", "b"], "answer": 1}}\n' for n in range(3)))
    assert [item.item_id for item in read_task(str(path), 2)] == ["1", "2"]
    assert len(read_task(str(path), None)) == 3


@pytest.mark.parametrize("name", ["hellaswag", "facts", "humaneval"])
def test_a_name_belongs_to_the_harness(name: str) -> None:
    with pytest.raises(EvaluateError, match=f"tasks: {name}: no such file; .* names are .* --lm-eval {name}$"):
        read_task(name, 2)


def test_a_file_without_items(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(EvaluateError, match=r"empty.jsonl: no items"):
        read_task(str(tmp_path / "empty.jsonl"), 2)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(EvaluateError, match=r"tasks: bad.jsonl:1: no item"):
        read_task(str(tmp_path / "bad.jsonl"), 2)
