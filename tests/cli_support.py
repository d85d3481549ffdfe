"""The command line in this process, and what it wrote."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from dmtd_export.cli.main import app

SERVE = ("--serve", "--prompt-len", "4", "--max-tokens", "6", "--repeats", "1", "--warmup", "0")


def dmtd(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, prog_name="dmtd")


def one_json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded
