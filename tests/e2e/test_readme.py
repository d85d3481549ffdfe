"""Every command and every Python block of README.md that is marked as tested runs, on a small random model in ``model/``."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dmtd_models.reference.testing import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r"<!-- tested[^>]*-->\n```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS = MARKED.findall((ROOT / "README.md").read_text(encoding="utf-8"))
CONSOLES = [
    [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    for language, text in BLOCKS
    if language == "console"
]
SCRIPTS = [text for language, text in BLOCKS if language == "python"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``model/``, and ``bundle/`` made by the README's own first command."""
    directory = tmp_path_factory.mktemp("readme")
    write_tiny_checkpoint(directory / "model", family="llama", layers=12, tokenizer=True)
    chat = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you today?"}]
    }
    for name in ("chats.jsonl", "held_out.jsonl"):
        (directory / name).write_text(f"{json.dumps(chat)}\n" * 40, encoding="utf-8")
    run(CONSOLES[0][0], directory)
    return directory


def run(command: str, directory: Path) -> str:
    program, *arguments = shlex.split(command)
    if program == "dmtd":
        launcher = [sys.executable, "-c", "from dmtd_export.cli.main import main; main()"]
    else:
        launcher = [str(Path(sys.executable).with_name(program))]
    done = subprocess.run(
        [*launcher, *arguments], cwd=directory, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_has_marked_blocks() -> None:
    assert CONSOLES[0][0].startswith("dmtd export model -o bundle")
    assert {shlex.split(command)[0] for block in CONSOLES for command in block} == {"dmtd", "polygraphy"}
    assert SCRIPTS


@pytest.mark.parametrize("commands", CONSOLES, ids=lambda commands: " ".join(commands[0].split()[:2]))
def test_commands_run(place: Path, commands: list[str]) -> None:
    """Those of one block in order: they build on one another."""
    for command in commands:
        assert command == CONSOLES[0][0] or run(command, place).strip(), command


@pytest.mark.parametrize("script", SCRIPTS)
def test_python_blocks_run(place: Path, script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=place, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
