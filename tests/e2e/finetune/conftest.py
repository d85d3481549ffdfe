"""A base, chats to train it on, and runs that measure nothing of the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dmtd_models.reference.testing import write_tiny_checkpoint


@pytest.fixture(autouse=True)
def _small_world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("dmtd_models.finetune.run.matmul_peak", lambda dtype, device: 1e12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "base", tokenizer=True, layers=4))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with file.open("w") as stream:
        for number in range(12):
            messages = [
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": f"It is {number * number}, more or less."},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return str(file)


@pytest.fixture
def at_forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Lets something happen in the n-th forward pass of the student."""
    from dmtd_models.finetune.student import Student

    whole = Student.forward

    def install(call: int, act: Callable[[], Any]) -> None:
        calls: list[int] = []

        def forward(self: Student, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                act()
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(Student, "forward", forward)

    return install
