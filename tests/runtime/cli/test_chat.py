"""``dmtd chat``: a conversation out of a pipe, its commands, and what it says of mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from bundles import with_files
from typer.testing import CliRunner, Result

from dmtd_export.cli.main import app
from dmtd_runtime.cli.chat import change_params, params_words
from dmtd_runtime.cli.options.sampling import GivenSampling
from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling.params import SamplingParams


def dmtd(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, prog_name="dmtd")


def test_chat_from_a_pipe(bundle: str, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["/system be brief", "hello", '"""two', 'lines"""', "/params max_tokens=3", "again", f"/save {saved}"]
    result = dmtd("chat", bundle, "--max-tokens", "4", stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", *("user", "assistant") * 3]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["hello", "two\nlines", "again"]
    assert messages[2]["content"] in result.stdout
    assert "> " not in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_chat_goes_on_after_mistakes(bundle: str, tmp_path: Path) -> None:
    lines = [
        "/nope",
        "/params temperature=-1",
        "/params nonsense",
        "x" * 300,
        f"/save {tmp_path}/no/such/folder",
        "/save",
        "/reset",
        "/exit",
        "never said",
    ]
    result = dmtd("chat", bundle, stdin="\n".join(lines) + "\n")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6
    assert errors[0] == "error: /nope: no such command; /help lists them"
    assert "expected at most 255" in errors[3]
    assert result.stdout == ""


def test_a_command_that_is_none_is_refused_as_a_message_is(bundle: str) -> None:
    assert dmtd("chat", bundle, stdin="/bogus\n").exit_code == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b"hello\n\xff\n", "line 2 of stdin is not UTF-8 at byte 0"),
        (b'"""a\nb\xe4\n', "line 2 of stdin is not UTF-8 at byte 1"),
        (b'hello\n"""two\nlines\n', 'the message that begins in line 2 was not said: its """ is not closed'),
        (b'"""a""" b\n', "got 'b' behind the closing"),
    ],
)
def test_a_pipe_that_makes_no_message(bundle: str, lines: bytes, words: str) -> None:
    result = CliRunner().invoke(app, ["chat", bundle, "--max-tokens", "2"], input=lines, prog_name="dmtd")
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in error


def test_chat_keeps_its_history_over_a_refused_message(bundle: str, tmp_path: Path) -> None:
    core = tokenizers.Tokenizer.from_file(str(Path(bundle) / "tokenizer.json"))
    core.add_tokens(["[PAD]"])  # id 259, which the model has no row for
    copy = with_files(Path(bundle), tmp_path / "bundle", {"tokenizer.json": core.to_str().encode()})
    saved = tmp_path / "talk.json"
    lines = ["hello", "[PAD]", "again", f"/save {saved}"]
    result = dmtd("chat", str(copy), "--max-tokens", "2", stdin="\n".join(lines))
    assert result.exit_code == 1
    assert "got '[PAD]', token id 259" in result.stderr
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["hello", "again"]


def test_params_have_blanks_and_objects() -> None:
    params = SamplingParams(temperature=0.5)
    changed = change_params(params, 'stop=["a b", "\\"c\\" ="]  logit_bias={"50": -100, "7": 1.5} top-p=0.5')
    assert changed == SamplingParams(temperature=0.5, stop=("a b", '"c" ='), logit_bias={50: -100.0, 7: 1.5}, top_p=0.5)
    assert change_params(params, 'stop="The end"').stop_strings == ("The end",)
    assert change_params(changed, "logit_bias=none stop=[]") == replace(params, top_p=0.5)
    # What is shown can be typed.
    assert change_params(SamplingParams(), " ".join(params_words(changed))) == changed
    for words in (
        'stop=["a',
        "logit_bias={50: -100}",
        'logit_bias={"a": 1}',
        "logit_bias=[1]",
        'stop="a b',
        "top_p=0.5 x",
    ):
        with pytest.raises(RequestError) as caught:
            change_params(params, words)
        assert "\n" not in str(caught.value)


def test_asked_tokens_win_over_recommended_ones() -> None:
    defaults = SamplingParams(min_tokens=10, max_tokens=20)
    assert GivenSampling(max_tokens=5).over(defaults).min_tokens == 5
    assert GivenSampling(max_tokens=15).over(defaults).min_tokens == 10
    with pytest.raises(RequestError, match="min_tokens"):
        GivenSampling(max_tokens=5, min_tokens=6).over(defaults)


def test_params_words() -> None:
    params = SamplingParams(temperature=0.5, max_tokens=5)
    changed = change_params(params, 'top_p=0.5 max-tokens=none stop=["a"] ignore_eos=true')
    assert (changed.temperature, changed.top_p, changed.max_tokens) == (0.5, 0.5, None)
    assert (changed.stop_strings, changed.ignore_eos) == (("a",), True)
    assert change_params(params, "stop=END").stop_strings == ("END",)
    with pytest.raises(RequestError, match="expected NAME=VALUE"):
        change_params(params, "n=2")


def test_chat_says_when_the_conversation_is_full_and_saves_over_no_other_file(bundle: str, tmp_path: Path) -> None:
    other = tmp_path / "mine.txt"
    other.write_text("precious")
    lines = "".join(f"{letter * 40}\n" for letter in "abcdefgh") + f"/save {other}\n"
    result = dmtd("chat", bundle, "--greedy", "--max-tokens", "60", stdin=lines)
    assert "the conversation is full" in result.stderr
    assert "is no saved conversation" in result.stderr
    assert other.read_text() == "precious"
