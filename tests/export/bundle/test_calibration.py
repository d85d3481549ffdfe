"""Calibration text: which tokens are taken of which files, and what is refused in one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dmtd_export.bundle.calibration import CalibrationText, read_calibration
from dmtd_export.errors import ExportError
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.reference.testing import write_tiny_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A byte a token; the three special tokens are 256 to 258."""
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("bytes") / "checkpoint", tokenizer=True)
    with open_checkpoint(checkpoint) as opened:
        return TextTokenizer.of_checkpoint(opened)


def decoded(text: CalibrationText, tokenizer: TextTokenizer) -> list[str]:
    return [tokenizer.decode(each.token_ids) for each in text.sequences]


def test_a_plain_file_is_cut_into_windows_whose_first_quarter_is_the_prompt(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    words = "".join(f"line {number:03}\n" for number in range(100))  # 9 bytes each
    (tmp_path / "prose.txt").write_text(words)
    text = read_calibration([str(tmp_path / "prose.txt")], tokenizer, max_tokens=900, window_len=300)
    assert decoded(text, tokenizer) == [words[:300], words[300:600], words[600:]]
    assert [each.prompt_len for each in text.sequences] == [75, 75, 75]
    assert text.num_tokens == 900


def test_windows_are_spread_over_the_file(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    words = "".join(f"line {number:03}\n" for number in range(400))
    (tmp_path / "prose.txt").write_text(words)
    text = read_calibration([str(tmp_path / "prose.txt")], tokenizer, max_tokens=600, window_len=300)
    assert decoded(text, tokenizer) == [words[:300], words[1800:2100]]


def test_a_text_that_is_too_short_for_the_tokens_asked_for_is_told(
    tmp_path: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "short.txt").write_text("word " * 80)
    records = [{"text": "words " * count} for count in (10, 80) * 8]  # of which one in two is taken: the short ones
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with caplog.at_level(logging.WARNING, "dmtd"):
        text = read_calibration([str(tmp_path / "uneven.jsonl")], tokenizer, max_tokens=2160)
        assert text.num_tokens < 2160 and caplog.messages == []
        text = read_calibration([str(tmp_path / "short.txt")], tokenizer, max_tokens=600)
    assert text.num_tokens == 400
    assert caplog.messages == [
        f"{tmp_path}/short.txt: holds 400 tokens, fewer than the 600 that --calibration-tokens asks of it; all of them are read"
    ]


def test_files_share_the_tokens_and_a_chat_keeps_its_prompt(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "prose.txt").write_text("word " * 400)
    chat = [{"role": "user", "content": "a question " * 10}, {"role": "assistant", "content": "an answer " * 40}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    names = [str(tmp_path / name) for name in ("prose.txt", "chats.jsonl")]
    prose, chats = read_calibration(names, tokenizer, max_tokens=600).sequences
    assert len(prose.token_ids) == len(chats.token_ids) == 300
    prompt = tokenizer.render(chat[:1], add_generation_prompt=True)
    assert tokenizer.decode(chats.token_ids[: chats.prompt_len]) == tokenizer.decode(tokenizer.encode_rendered(prompt))


def test_the_digest_is_of_the_tokens_alone(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    for name, word in (("one", "word "), ("same", "word "), ("other", "work ")):
        (tmp_path / f"{name}.txt").write_text(word * 200)
    (tmp_path / "record.jsonl").write_text(json.dumps({"text": "word " * 200}))
    names = ("one.txt", "same.txt", "record.jsonl", "other.txt")
    digests = [read_calibration([str(tmp_path / name)], tokenizer, max_tokens=4096).sha256 for name in names]
    assert digests[0] == digests[1] == digests[2] != digests[3]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.txt", None, "none.txt: cannot be read as text (No such file or directory)"),
        ("empty.txt", b" \n", "empty.txt: got an empty file, expected text"),
        ("zeros.txt", bytes(4000), "zeros.txt: got NUL bytes, expected text"),
        ("bytes.txt", b"\xff\xfe words", "bytes.txt: cannot be read as text (not UTF-8 at byte 0)"),
        ("short.txt", b"a few words only here", "got 21 tokens, expected 256 or more"),
        ("few.txt", b"words", "few.txt: no text of 16 tokens in it"),
        ("none.jsonl", b"\n", "none.jsonl: no text of 16 tokens in it"),
        ("other.jsonl", b'{"words": "here"}\n', "other.jsonl:1: got `words`, expected one of"),
        ("broken.jsonl", b'{"text": \n', "broken.jsonl:1: not JSON"),
    ],
)
def test_what_cannot_calibrate_is_one_line(
    tmp_path: Path, tokenizer: TextTokenizer, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExportError) as refused:
        read_calibration([str(tmp_path / name)], tokenizer, max_tokens=4096)
    assert expected in str(refused.value)
    assert refused.value.param == "calibration"
    assert "\n" not in str(refused.value)
