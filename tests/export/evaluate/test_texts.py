"""Windows of text: lengths, prefixes, budgets; files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.texts import WindowPlan, check_text, collect_windows, cut_windows, is_chats, read_texts
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.items import TextItem
from dmtd_models.reference.testing import TOKENIZER_VOCAB_SIZE, write_tiny_checkpoint


def no_chats():
    raise AssertionError("plain text needs no chat template")


PLAN = WindowPlan(window_len=30, context_len=4, max_tokens=3000, seed=0)
BOS = 999


def encode(text: str) -> list[int]:
    """A number a word, behind a BOS."""
    return [BOS, *map(int, text.split())]


def document(name: str, length: int) -> TextItem:
    return TextItem(source="s", text_id=name, text=" ".join(map(str, range(length))))


def test_every_window_begins_with_the_tokenizer_s_prefix_and_nothing_is_lost() -> None:
    found = cut_windows([document("a", 70)], encode, PLAN)
    assert [len(w.token_ids) for w in found] == [30, 30, 13]
    assert all(w.token_ids[0] == BOS for w in found)
    assert [t for w in found for t in w.token_ids[1:]] == list(range(70))


def test_pieces_too_short_to_score_are_dropped() -> None:
    # 12 tokens are needed: a context of 4 and 8 to score.
    found = cut_windows([document("a", 11), document("b", 12), document("c", 29 + 11)], encode, PLAN)
    assert [(w.text_id, len(w.token_ids)) for w in found] == [("b", 13), ("c", 30)]


def test_a_seeded_choice_within_the_budget() -> None:
    def chosen(seed: int) -> list[str]:
        plan = WindowPlan(window_len=30, context_len=4, max_tokens=26 * 10 + 25, seed=seed)
        return [w.text_id for w in cut_windows([document(f"{i:03}", 25) for i in range(60)], encode, plan)]

    assert len(chosen(0)) == 10
    assert chosen(0) == sorted(chosen(0)) == chosen(0)
    assert chosen(0) != chosen(1)


def test_the_budget_counts_tokens_not_windows() -> None:
    """Short documents, many of them; long ones, few; one at least."""

    def cut(length: int, max_tokens: int) -> list[int]:
        plan = WindowPlan(window_len=1000, context_len=4, max_tokens=max_tokens, seed=0)
        found = cut_windows([document(f"{i:03}", length) for i in range(60)], encode, plan)
        return [len(w.token_ids) for w in found]

    assert cut(19, 400) == [20] * 20
    assert cut(199, 400) == [200] * 2
    assert cut(199, 399) == cut(199, 1) == [200]
    assert cut(19, 10_000) == [20] * 60


def test_the_budget_is_shared(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(" ".join(["1"] * 29 * 20))
    plan = WindowPlan(window_len=30, context_len=4, max_tokens=30 * 8, seed=0)
    found = collect_windows([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], encode, no_chats, plan)
    assert [w.source for w in found] == ["a.txt"] * 4 + ["b.txt"] * 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "1 2"}\nnot json\n', r"a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"words": "1 2"}\n', r"a.jsonl:1: expected \{\"text\": ...\} with a string"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluateError, match=message):
        list(read_texts(str(tmp_path / name)))


def test_a_name_that_is_nothing() -> None:
    with pytest.raises(EvaluateError, match=r"texts: austen: no such file or directory; give a text file, or \.jsonl"):
        check_text("austen")


def test_a_first_record_of_no_known_form_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "2 + 2?"}\n')
    with pytest.raises(EvaluateError, match=r"a.jsonl:1: got `question`, expected one of `messages`, `text`, or"):
        check_text(str(tmp_path / "a.jsonl"))


def test_a_text_too_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("1 2 3")
    with pytest.raises(EvaluateError, match=r"short.txt: no document has 12 tokens"):
        collect_windows([str(tmp_path / "short.txt")], encode, no_chats, PLAN)


def test_chats_are_scored_behind_their_prompts(tmp_path):
    """The rendered prompt is the context: known strings, tokenised by the checkpoint's own byte tokenizer."""
    directory = write_tiny_checkpoint(tmp_path / "model", vocab_size=TOKENIZER_VOCAB_SIZE, tokenizer=True)
    chats = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello to you"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},  # too short to score
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    with open_checkpoint(directory) as checkpoint:
        tokenizer = TextTokenizer.of_checkpoint(checkpoint)
        [window] = collect_windows([str(file)], no_encode, lambda: tokenizer, PLAN_OF_CHATS)
        decode = tokenizer.tokenizer.decode
        assert decode(list(window.token_ids[: window.context_len]), skip_special_tokens=False) == (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert (
            decode(list(window.token_ids[window.context_len :]), skip_special_tokens=False) == "Hello to you<|im_end|>"
        )
    assert is_chats(str(file)) and not is_chats("austen")


def no_encode(text):
    raise AssertionError("chats are not read as plain text")


PLAN_OF_CHATS = WindowPlan(window_len=200, context_len=4, max_tokens=2000, seed=0)


SEPARATED = "1 2\u2028 3\x85 4\x0b 5"  # line separators of Unicode, which JSON leaves as they are


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps({"text": SEPARATED}, ensure_ascii=False).replace("\x0b", "\\u000b")),
        ("a.ndjson", json.dumps({"text": SEPARATED})),
        ("a.json", json.dumps([{"text": SEPARATED}])),
        ("a.jsonl", "\ufeff" + json.dumps({"text": SEPARATED})),
    ],
)
def test_a_data_file_is_read_as_training_reads_it(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert not is_chats(str(tmp_path / name))
    assert [item.text for item in read_texts(str(tmp_path / name))] == [SEPARATED]


def test_a_directory_is_read_as_training_reads_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, text in (("b.jsonl", "3 4"), ("a.jsonl", "1 2")):
        (tmp_path / "data" / name).write_text(json.dumps({"text": text}) + "\n")
    items = list(read_texts(str(tmp_path / "data")))
    assert [(item.source, item.text_id, item.text) for item in items] == [
        ("data", "a.jsonl:1", "1 2"),
        ("data", "b.jsonl:1", "3 4"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluateError, match=r"texts: .*empty: no data in this directory"):
        list(read_texts(str(tmp_path / "empty")))


def test_a_parquet_file_of_texts(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["1 2", "3"]}), tmp_path / "a.parquet")
    assert [item.text for item in read_texts(str(tmp_path / "a.parquet"))] == ["1 2", "3"]


def test_half_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1 \\ud83d 2"}\n')
    with pytest.raises(EvaluateError, match=r"texts: a.jsonl:1: text: got half a character"):
        list(read_texts(str(tmp_path / "a.jsonl")))


def test_an_answer_without_a_prompt_is_scored_from_its_second_token(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model", vocab_size=TOKENIZER_VOCAB_SIZE, tokenizer=True)
    file = tmp_path / "ids.jsonl"
    records = [{"prompt_ids": [], "answer_ids": [*range(65, 65 + n)]} for n in (9, 8)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with open_checkpoint(directory) as checkpoint:
        tokenizer = TextTokenizer.of_checkpoint(checkpoint)
        [window] = collect_windows([str(file)], no_encode, lambda: tokenizer, PLAN_OF_CHATS)
    assert window.context_len == 1 and window.token_ids == tuple(range(65, 74))
