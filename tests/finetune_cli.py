"""``dmtd finetune`` called by tests: a short run's options, and its one line of error."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from dmtd_export.cli.main import app

SPLIT = ("--decoding-layers", "2", "--cycle-length", "3")
QUICK = (*SPLIT, "--precision", "float32", "--tokens-per-step", "128", "--top-k", "4", "--device", "cpu")


def dmtd(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="dmtd")


def finetune(base: str, output: Path, data: str | None, *more: str, quick: tuple[str, ...] = QUICK) -> Result:
    return dmtd("finetune", base, "-o", str(output), *(("--data", data) if data else ()), *quick, *more)


def error_line(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.exit_code == (2 if lines[0].startswith("error: --") else 1), (result.output, result.exception)
    assert "Traceback" not in result.output
    return lines[0]


def write_lines(file: Path, *values: object) -> str:
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(file)
