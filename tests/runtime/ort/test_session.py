"""What an error of a session says."""

from __future__ import annotations

import pytest

from dmtd_runtime.ort.session import MOST_SHOWN, first_line

LONG = (
    "[ONNXRuntimeError] : 1 : FAIL : Load model from /model-bundles/cycle.ort.onnx failed:"
    + " model-of-many-words" * 20
)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("  [ONNXRuntimeError] : 6 : no\nmore of it", "[ONNXRuntimeError] : 6 : no"),
        ("", "RuntimeError"),
        (LONG, LONG[: LONG.rindex(" ", 0, MOST_SHOWN - len(" ..."))] + " ..."),
    ],
)
def test_a_message_is_its_first_line_cut_at_a_word(message: str, line: str) -> None:
    assert first_line(RuntimeError(message)) == line
    assert len(line) <= MOST_SHOWN
