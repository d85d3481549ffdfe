"""Serving loads as data: lengths, ids and arrivals against numpy's own, and files of prompts with what is wrong in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle

from dmtd_runtime.bench.dataset import read_dataset
from dmtd_runtime.bench.load import LoadOptions, arrival_times, draw_requests, length_range, with_long_prompts
from dmtd_runtime.errors import RequestError
from dmtd_runtime.text.tokenizer import Tokenizer

VOCAB = 40


def test_lengths_and_ids_are_numpys() -> None:
    drawn = draw_requests(LoadOptions(prefix_len=3), 50, prompt_len=10, max_tokens=7, vocab_size=VOCAB, seed=5)
    generator = np.random.default_rng(5)
    prompts = generator.integers(5, 16, 50)  # half of 10 to one and a half of it
    outputs = generator.integers(4, 11, 50)  # 3.5 to 10.5: whole numbers between
    prefix = generator.integers(0, VOCAB, 3).tolist()
    assert [len(one.prompt_ids) for one in drawn] == (prompts + 3).tolist()
    assert [one.max_tokens for one in drawn] == outputs.tolist()
    for one, own in zip(drawn, prompts, strict=True):
        assert list(one.prompt_ids) == prefix + generator.integers(0, VOCAB, own).tolist()
    assert {len(one.prompt_ids) for one in drawn} == set(range(8, 19))


@pytest.mark.parametrize(
    ("length", "ratio", "expected"),
    [(10, 0.0, (10, 10)), (10, 0.5, (5, 15)), (7, 0.5, (4, 10)), (1, 0.9, (1, 1)), (3, 0.99, (1, 5))],
)
def test_ranges_of_lengths(length: int, ratio: float, expected: tuple[int, int]) -> None:
    assert length_range(length, ratio) == expected


def test_long_prompts_stand_where_the_last_slot_gets_them() -> None:
    options = LoadOptions(long_prompts=2, long_prompt_len=9)
    drawn = draw_requests(options, 5, prompt_len=4, max_tokens=7, vocab_size=VOCAB, seed=5)
    brought = with_long_prompts(drawn, options, 3, vocab_size=VOCAB, seed=5)
    assert brought[:2] + brought[4:] == drawn
    assert [(len(one.prompt_ids), one.max_tokens) for one in brought[2:4]] == [(9, 1), (9, 1)]
    assert brought[2].prompt_ids != brought[3].prompt_ids


def test_arrivals_are_a_poisson_process() -> None:
    at = arrival_times(4.0, 2000, 9)
    assert at[0] == 0.0
    gaps = np.diff(at)
    np.testing.assert_allclose(gaps, np.random.default_rng(9).exponential(0.25, 1999), rtol=1e-9)
    assert gaps.mean() == pytest.approx(0.25, rel=0.1) and gaps.std() == pytest.approx(0.25, rel=0.1)
    assert arrival_times(math.inf, 3, 9) == (0.0, 0.0, 0.0)
    # Twice the rate: the same process in half of the time, so that loads differ in nothing else.
    np.testing.assert_allclose(np.array(arrival_times(8.0, 50, 9)) * 2, at[:50])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"request_rates": ()}, "request_rates: got"),
        ({"request_rates": (1.0, 0.0)}, "request_rates: got"),
        ({"request_rates": (math.nan,)}, "request_rates: got"),
        ({"request_rates": (1.0,), "concurrency": 2}, "concurrency: got 2 with a request rate"),
        ({"concurrency": 0}, "concurrency: got 0"),
        ({"num_prompts": 0}, "num_prompts: got 0"),
        ({"prefix_len": -1}, "prefix_len: got -1"),
        ({"range_ratio": 1.0}, "range_ratio: got 1"),
        ({"range_ratio": math.nan}, "range_ratio: got nan"),
    ],
)
def test_loads_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        LoadOptions(**settings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found = Tokenizer.from_directory(make_bundle(tmp_path_factory.mktemp("dataset")))
    assert found is not None
    return found


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    return path


def test_files_of_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"from": "human", "value": "hello you"}, {"from": "gpt", "value": "hello"}, {"from": "human", "value": ""}]
    path = write(
        tmp_path / "prompts.jsonl",
        {"id": "a", "conversations": turns},
        {"prompt": "hello", "max_tokens": 3},
        {"prompt": [1, 2, 3], "output_len": 5},
        {"prompt": [4]},
        {"prompt": [1] * 30, "max_tokens": 71},
    )
    found = read_dataset(path, tokenizer, vocab_size=1000, max_model_len=100, max_tokens=9)
    assert found.left_out == 1
    one, two = (len(tokenizer.encode(text)) for text in ("hello", "hello you"))
    assert [(len(r.prompt_ids), r.max_tokens) for r in found.requests] == [(two, one), (one, 3), (3, 5), (1, 9)]
    assert found.requests[2].prompt_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: got no JSON"),
        ("[1]", 'got neither "conversations" nor "prompt"'),
        ('{"text": "x"}', 'got neither "conversations" nor "prompt"'),
        ('{"conversations": [{"from": "human", "value": "x"}]}', "conversations: got no prompt with an answer"),
        ('{"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}', "got null for a text"),
        ('{"prompt": " "}', 'got " " for a text'),
        ('{"prompt": []}', "expected token ids from 0 to 39, at least one"),
        ('{"prompt": [40]}', "expected token ids from 0 to 39"),
        ('{"prompt": [true]}', "expected token ids from 0 to 39"),
        ('{"prompt": [1], "max_tokens": 0}', "max_tokens: got 0"),
        ('{"prompt": [1], "output_len": "many"}', 'max_tokens: got "many"'),
    ],
)
def test_lines_that_are_no_prompts(line: str, words: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [1]}\n' + line, encoding="utf-8")
    with pytest.raises(RequestError, match=r"^dataset: ") as caught:
        read_dataset(path, tokenizer, vocab_size=VOCAB, max_model_len=100, max_tokens=9)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    settings = {"vocab_size": VOCAB, "max_model_len": 10, "max_tokens": 9}
    for path, words in (
        (tmp_path / "none", "cannot be read as text"),
        (binary, "cannot be read as text"),
        (write(tmp_path / "long", {"prompt": [1, 2]}), "expected at least one that fits 10 tokens"),
        (write(tmp_path / "mute", {"prompt": "hello"}), "the bundle has no tokenizer"),
    ):
        with pytest.raises(RequestError, match=words):
            read_dataset(path, None, **settings)
