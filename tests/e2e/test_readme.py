"""Every command and every Python block of the READMEs that is marked as tested runs, on a small random model in ``model/``."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmtd_export import verify
from dmtd_export.cli.main import app
from dmtd_models.reference.testing import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "dmtd_export/README.md", "runtime/README.md", "models/README.md", "tools/README.md")
MARKED = re.compile(r"<!-- tested[^>]*-->\n```(\w+)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]

    def __str__(self) -> str:
        first = self.commands[0] if self.commands else self.text
        return f"{self.page}: {' '.join(first.split()[:3])}"


BLOCKS = [
    Block(page, language, text)
    for page in PAGES
    for language, text in MARKED.findall((ROOT / page).read_text(encoding="utf-8"))
]
CONSOLES = [block for block in BLOCKS if block.language == "console"]
SCRIPTS = [block for block in BLOCKS if block.language == "python"]
FIRST = CONSOLES[0].commands[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``model/`` and text, and ``bundle/`` made by README.md's own first command, with engines in it.

    All blocks share it, and those of a page may use what an earlier one of it made: tools/test keeps a file in one worker.
    """
    directory = tmp_path_factory.mktemp("readme")
    write_tiny_checkpoint(directory / "model", family="llama", layers=12, tokenizer=True)
    chat = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you today?"}]
    }
    for name in ("chats.jsonl", "held_out.jsonl"):
        (directory / name).write_text(f"{json.dumps(chat)}\n" * 40, encoding="utf-8")
    item = {"prompt": "The sky is", "choices": [" blue today", " made of bread"], "answer": 0}
    (directory / "items.jsonl").write_text(f"{json.dumps(item)}\n" * 4, encoding="utf-8")
    (directory / "prompts.txt").write_text("One\nTwo\n", encoding="utf-8")
    run(FIRST, directory)
    run("dmtd build bundle --backend simulator", directory)
    return directory


def run(command: str, directory: Path) -> str:
    """Its output. ``dmtd`` is called in this process, which has its libraries loaded; the rest are processes.

    The first export verifies what it made to the highest level, the others its structure.
    """
    program, *arguments = shlex.split(command)
    if program == "dmtd":
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(directory)
            if command != FIRST:
                patch.setattr(verify, "VerifyOptions", partial(verify.VerifyOptions, level="structure"))
            result = CliRunner().invoke(app, arguments, prog_name="dmtd")
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
        return result.stdout
    launcher = [str(ROOT / program) if program.startswith("tools/") else str(Path(sys.executable).with_name(program))]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "runtime", "models"))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_page_has_marked_blocks() -> None:
    assert FIRST.startswith("dmtd export model -o bundle")
    assert {block.page for block in BLOCKS} == set(PAGES)
    assert SCRIPTS


@pytest.mark.parametrize("block", CONSOLES, ids=str)
def test_commands_run(place: Path, block: Block) -> None:
    """Those of one block in order. ``cd`` holds until the block's end."""
    directory = place
    for command in block.commands:
        if command.startswith("cd "):
            (directory,) = directory.glob(command.removeprefix("cd "))
        elif command != FIRST:
            assert run(command, directory).strip(), command


@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_python_blocks_run(place: Path, block: Block) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.text], cwd=place, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
