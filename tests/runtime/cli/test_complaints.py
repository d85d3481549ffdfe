"""Typer's complaints, in the words of our own errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_support import dmtd
from typer.testing import CliRunner

from dmtd_export.cli.main import app


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "X", "--weights", "int5"), "'--weights': 'int5' is not one of 'float', 'keep', 'int8'"),
        (("generate", "X", "--max-tokens", "1.5"), "'--max-tokens': got '1.5', expected a whole number"),
        (("generate", "X", "--temperature", "x"), "'--temperature': got 'x', expected a number"),
        (("generate", "X", "--threads", "0"), "'--threads': got '0', expected 1 or more"),
        (("generate", "X", "--threads", "99999"), "'--threads': got '99999', expected at most "),
    ],
)
def test_what_typer_complains_of_is_told_in_our_words(arguments: Sequence[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments, prog_name="dmtd", env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.stderr and "Value error" not in result.stderr and "Input should" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("inspect", ""), "BUNDLE"),
        (("inspect", "-m", ""), "--model"),
        (("export", "X", "-o", ""), "--output"),
        (("export", "X", "-o", "b", "--adapter="), "--adapter"),
        (("finetune", "", "-o", "b"), "BASE"),
        (("evaluate", "X", "--base", ""), "--base"),
        (("verify", "X", "--checkpoint", ""), "--checkpoint"),
        (("build", "X", "--timing-cache", ""), "--timing-cache"),
        (("generate", "X", "--prompt-file", ""), "--prompt-file"),
        (("bench", "X", "--dataset", ""), "--dataset"),
        (("serve", "X", "--chat-template", ""), "--chat-template"),
    ],
)
def test_an_empty_name_is_not_the_current_directory(arguments: Sequence[str], place: str) -> None:
    result = dmtd(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {place}: got an empty name, expected that of a file or directory; give one\n"


def test_an_empty_name_in_a_file_of_options_is_told_of_its_key(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "serve.yaml").write_text('chat-template: ""\n')
    result = dmtd("serve", ".", "--config", str(tmp_path / "serve.yaml"), "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: chat-template in {tmp_path / 'serve.yaml'}: got an empty name")


def test_the_current_directory_and_empty_texts_are_no_empty_names() -> None:
    for arguments in (("inspect", "."), ("generate", "X", "-p", "")):
        assert "empty name" not in dmtd(*arguments).stderr
