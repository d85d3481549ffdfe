"""Typer's complaints, in the words of our own errors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
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
