"""Panics of native libraries, which are no ``Exception``: one guard turns them into one, wherever files are opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dmtd_errors.native import NativePanicError, call_native
from dmtd_models.checkpoints import gguf_tokenizer
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.errors import DataError
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.errors import BundleError, DmtdError
from dmtd_runtime.text.tokenizer import Tokenizer

EMPTY: dict[str, Any] = dict.fromkeys(
    ["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"]
)
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
# tokenizers 0.23 panics over the first two when they are read, over the third when text is encoded.
AT_LOAD = {
    "normaliser": EMPTY | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "YWJj"}, "model": BPE},
    "prefix": EMPTY | {"model": BPE | {"continuing_subword_prefix": "#" * 10}},
}
UNKNOWN_PIECE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []}
AT_USE = EMPTY | {"post_processor": UNKNOWN_PIECE | {"special_tokens": {}}, "model": BPE}


def text_of(described: dict[str, Any]) -> str:
    return json.dumps({"version": "1.0", "added_tokens": [], **described})


def test_the_library_still_panics() -> None:
    # Otherwise the tests below hold without a guard.
    with pytest.raises(BaseException, match="Precompiled") as caught:
        tokenizers.Tokenizer.from_str(text_of(AT_LOAD["normaliser"]))
    assert not isinstance(caught.value, Exception)


@pytest.mark.parametrize("name", list(AT_LOAD))
def test_reading_a_tokenizer_is_one_line_and_nothing_on_stderr(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(text_of(AT_LOAD[name]))
    with pytest.raises(BundleError, match="not a usable tokenizer") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer({"tokenizer.json": text_of(AT_LOAD[name]).encode()}, vocab_size=3)
    assert capfd.readouterr().err == ""


def test_encoding_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text_of(AT_USE))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer is not None
    with pytest.raises(DmtdError, match="no entry found for key"):
        tokenizer.encode("ab")
    assert tokenizer.decode([0, 1]) == "a b"
    with pytest.raises(DataError, match="fails on this text"):
        TextTokenizer({"tokenizer.json": text_of(AT_USE).encode()}, vocab_size=3).encode_texts(["ab"])


def test_a_gguf_file_is_left_without_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panicking:
        @staticmethod
        def from_str(_: str) -> tokenizers.Tokenizer:
            return tokenizers.Tokenizer.from_str(text_of(AT_LOAD["prefix"]))

    monkeypatch.setattr(gguf_tokenizer, "Tokenizer", Panicking)
    data = {"model": "gpt2", "pre": "smollm", "tokens": ["a"], "token_type": [1], "merges": []}
    made = gguf_tokenizer.tokenizer_from_metadata({f"tokenizer.ggml.{k}": v for k, v in data.items()}, max_len=8)
    assert made.problem is not None
    assert "do not fit together" in made.problem


def test_what_was_written_meanwhile_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    assert call_native(os.write, 2, b"a line of another thread\n", quiet=True) == 25
    assert capfd.readouterr().err == "a line of another thread\n"


def test_other_exceptions_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        call_native(lambda: 1 / 0, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        call_native(_interrupted)
    assert issubclass(NativePanicError, Exception)


def _interrupted() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = write_tiny_checkpoint(tmp_path_factory.mktemp("model"), layers=2, tokenizer=True)
    described: dict[str, Any] = json.loads((place / "tokenizer.json").read_text())
    return described


PIECES = st.sampled_from(
    [
        ("normalizer", AT_LOAD["normaliser"]["normalizer"]),
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}),
        ("post_processor", AT_USE["post_processor"]),
        ("model", BPE | {"continuing_subword_prefix": "#" * 10}),
        ("model", {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}),
        ("model", {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "#", "vocab": {}}),
        ("decoder", {"type": "WordPiece", "prefix": "", "cleanup": True}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(?=a)+"}, "behavior": "Isolated", "invert": False}),
        ("added_tokens", []),
    ]
)


@given(edits=st.lists(PIECES, min_size=1, max_size=3), text=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_tokenizer_encodes_or_is_refused(
    edits: list[tuple[str, Any]], text: str, whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("edited")
    (place / "tokenizer.json").write_text(json.dumps(whole | dict(edits)))
    try:
        tokenizer = Tokenizer.from_directory(place)
        assert tokenizer is not None
        ids = tokenizer.encode(text)
        assert isinstance(tokenizer.decode(ids), str)
    except DmtdError as refused:
        told = str(refused)
    else:
        told = ""
    assert "\n" not in told
