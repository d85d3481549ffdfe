"""Words of errors: what JSON calls a value, why a file cannot be read, one thing or several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmtd_errors.words import counted, kind_of, reason, shown


@pytest.mark.parametrize(
    ("value", "text", "kind"),
    [
        (None, "null", "null"),
        (True, "true", "true"),
        (1, "1", "a number"),
        (0.5, "0.5", "a number"),
        ("é\n", '"é\\n"', "text"),
        ([None, "a"], '[null, "a"]', "a list"),
        ({"a": False}, '{"a": false}', "an object"),
        (b"a", "b'a'", "a value of type bytes"),
        ("x" * 70, '"' + "x" * 56 + "...", "text"),
    ],
)
def test_values_are_told_as_json_has_them(value: object, text: str, kind: str) -> None:
    assert (shown(value), kind_of(value)) == (text, kind)


def test_an_integer_that_python_does_not_print() -> None:
    assert shown(10**5000) == "a value of type int too long to print"


def test_reasons_have_no_numbers_of_python(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Errno") as caught:
        (tmp_path / "none").read_text()
    assert reason(caught.value) == "No such file or directory"
    with pytest.raises(UnicodeDecodeError) as broken:
        b"a\xff".decode()
    assert reason(broken.value) == "not UTF-8 at byte 1"
    with pytest.raises(json.JSONDecodeError) as wrong:
        json.loads('{"a":')
    assert reason(wrong.value) == "expecting value in line 1, column 6"
    assert (reason(ValueError("a\nb")), reason(KeyError())) == ("a b", "KeyError")


def test_one_thing_or_several() -> None:
    told = [counted(number, "token") for number in (0, 1, 2)]
    assert [*told, counted(1, "pass", "passes"), counted(2, "pass", "passes")] == [
        "0 tokens", "1 token", "2 tokens", "1 pass", "2 passes"
    ]  # fmt: skip
