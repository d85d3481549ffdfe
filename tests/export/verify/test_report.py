"""The report of a verification as a terminal shows it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dmtd_export.verify.report import Check, VerifyReport, render


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_no_name_and_no_detail(width: int) -> None:
    name = "full_pass.ort.batch64.onnx, inputs not rounded, against the reference"
    detail = "int8 caches: of 6656 values 1230 at a rounding's border, 2 saturated"
    numbers = ("1024", "3.7", "12 ULP of bfloat16")
    check = Check(
        name=name, level="oracle", ok=True, worst=3.7, margin=12.0, unit="ULP of bfloat16", cases=1024, detail=detail
    )
    console = Console(width=width, file=io.StringIO())
    console.print(render(VerifyReport(level="oracle", checks=(check,))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    _, _, shown = text.partition("✓")
    for number in numbers:
        assert number in shown
        shown = shown.replace(number, "", 1)
    assert "".join(shown.split()) == "".join((name + detail).split())
