"""Tokenizer and TextStream over small tokenizers that the tests train or write themselves."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from dmtd_runtime.errors import BundleError, RequestError
from dmtd_runtime.text.special_tokens import eos_token_ids_of
from dmtd_runtime.text.tokenizer import LONG_TEXT, TextStream, Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Ein größerer Fuchs läuft über die Straße.",
    "敏捷的棕色狐狸跳过懒狗。",
    "Smile 😀 wave 👋🏽 family 👨‍👩‍👧 flag 🇨🇭.",
]
EMOJI = "👨‍👩‍👧"


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE of GPT-2's kind: 2 special tokens, 256 bytes, a few merges, 3 added tokens."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    core.add_tokens(["naïve", "two words €", AddedToken("<plain>", normalized=False)])
    return core


def byte_fallback() -> tokenizers.Tokenizer:
    """A tokenizer of Llama 2's kind: spaces as ▁, unknown characters as <0xHH> tokens."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hello",
        "▁world",
        "lo",
        "!",
        "é",
    ]
    core = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


def bundle(path: Path, core: tokenizers.Tokenizer, **configs: Any) -> Path:
    core.save(str(path / "tokenizer.json"))
    for name, value in configs.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def wrap(core: tokenizers.Tokenizer) -> Tokenizer:
    path = core.to_str()
    return Tokenizer(tokenizers.Tokenizer.from_str(path))


BYTE_LEVEL = wrap(byte_level())
BYTE_FALLBACK = wrap(byte_fallback())
METASPACE_CORE = byte_fallback()
METASPACE_CORE.decoder = decoders.Metaspace()
METASPACE = wrap(METASPACE_CORE)
WORDPIECE_CORE = byte_fallback()
WORDPIECE_CORE.decoder = decoders.WordPiece("##")
WORDPIECE = wrap(WORDPIECE_CORE)
NO_DECODER_CORE = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a"))
NO_DECODER = wrap(NO_DECODER_CORE)
FUSED_CORE = byte_level()
FUSED_CORE.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
FUSED = wrap(FUSED_CORE)
# Byte level inside a longer sequence takes the general way.
MIXED_CORE = byte_level()
MIXED_CORE.decoder = decoders.Sequence([decoders.Replace("~", "-"), decoders.ByteLevel()])
MIXED = wrap(MIXED_CORE)


# -- loading


def test_absent_is_none(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(tmp_path) is None


def test_loads_ids_and_special_tokens(tmp_path: Path) -> None:
    core = byte_level()
    bundle(
        tmp_path,
        core,
        tokenizer_config={"bos_token": {"content": "<|start|>", "lstrip": False}, "eos_token": "<|end|>"},
        generation_config={"eos_token_id": [7, 1, 9]},
        config={"eos_token_id": 5},
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer is not None
    assert tokenizer.eos_token_ids == (7, 1, 9)
    assert (tokenizer.bos_token_id, tokenizer.bos_token, tokenizer.eos_token) == (0, "<|start|>", "<|end|>")
    assert tokenizer.vocab_size == len(core.get_vocab(with_added_tokens=True))
    assert max(core.get_vocab(with_added_tokens=True).values()) == tokenizer.vocab_size - 1
    assert tokenizer.token_to_id("<|end|>") == 1
    assert tokenizer.token_to_id("nothing of the kind") is None


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": 5}}, (5,)),
        ({"config": {"eos_token_id": [5, 6]}, "generation_config": {}}, (5, 6)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": 4}}, (4,)),
        ({"generation_config": {"eos_token_id": None}}, ()),
        ({"tokenizer_config": {"eos_token": "<|end|>", "bos_token": None}, "config": {"eos_token_id": 5}}, (5, 1)),
    ],
)
def test_eos_token_ids(tmp_path: Path, configs: dict[str, Any], expected: tuple[int, ...]) -> None:
    bundle(tmp_path, byte_level(), **configs)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer is not None
    assert tokenizer.eos_token_ids == expected
    assert tokenizer.bos_token_id is None
    assert eos_token_ids_of(tmp_path) == tuple(i for i in expected if i != 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "not a usable tokenizer"),
        ("tokenizer.json", b"{}", "not a usable tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a"', "not a usable tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "cannot be read"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"[1]", "got a list, expected an object"),
        ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token: got 5, expected a token's text"),
        ("tokenizer_config.json", b'{"eos_token": "<nope>"}', "expected a token of tokenizer.json"),
        ("tokenizer_config.json", b"[" * 100_000, "not JSON"),
        ("generation_config.json", b'{"eos_token_id": "2"}', 'eos_token_id: got "2", expected a token id'),
        ("generation_config.json", b'{"eos_token_id": [true]}', "eos_token_id: got [true]"),
        ("config.json", b'{"eos_token_id": -1}', "eos_token_id: got -1"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    bundle(tmp_path, byte_level())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert name in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_directory(tmp_path)


# -- encode and decode


@pytest.mark.parametrize("text", [*SENTENCES, "", " ", "\r\n\t", "\x00", "naïve two words €", EMOJI * 3])
def test_byte_level_round_trip(text: str) -> None:
    # The added token "naïve" reads back as bytes of another alphabet, so it is taken out here.
    text = text.replace("naïve", "")
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


def test_a_long_text_has_the_ids_that_it_has_in_pieces() -> None:
    line = "The <|start|> of it, and two words more.\n"
    text = line * (LONG_TEXT // len(line) + 1)
    assert len(text) > LONG_TEXT
    assert BYTE_LEVEL.encode(text) == BYTE_LEVEL.encode(line) * (len(text) // len(line))


def test_special_tokens_in_text_and_out() -> None:
    ids = BYTE_LEVEL.encode("<|start|>The<|end|>")
    assert (ids[0], ids[-1]) == (0, 1)
    assert BYTE_LEVEL.decode(ids) == "The"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "<|start|>The<|end|>"


def test_ids_without_text_give_none_and_impossible_ids_are_refused() -> None:
    assert BYTE_LEVEL.decode([BYTE_LEVEL.vocab_size + 5]) == ""
    for token_id in (-1, 2**40):
        with pytest.raises(RequestError, match="token ids"):
            BYTE_LEVEL.decode([token_id])


def test_text_that_is_none() -> None:
    with pytest.raises(RequestError, match="half a surrogate pair at character 2"):
        BYTE_LEVEL.encode("ab\ud83d")
    with pytest.raises(RequestError, match="got int, expected a string"):
        BYTE_LEVEL.encode(5)  # type: ignore[arg-type]


def test_a_post_processor_adds_bos_to_prompts_and_not_to_rendered_chats(tmp_path: Path) -> None:
    core = byte_level()
    core.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[("<|start|>", 0)]
    )
    tokenizer = Tokenizer.from_directory(bundle(tmp_path, core))
    assert tokenizer is not None
    assert tokenizer.encode("The").count(0) == 1
    assert tokenizer.encode("<|start|>The").count(0) == 2
    assert tokenizer.encode("<|start|>The", add_special_tokens=False).count(0) == 1
    assert tokenizer.encode("") == [0]


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    core = byte_level()
    core.enable_truncation(4)
    core.enable_padding(length=50)
    tokenizer = Tokenizer.from_directory(bundle(tmp_path, core))
    assert tokenizer is not None
    text = "abcdefgh" * 10
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


# -- streaming


def pieces_of(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    stream = tokenizer.text_stream(skip_special_tokens=skip)
    return [stream.push(token_id) for token_id in ids] + [stream.flush()]


def test_an_emoji_over_many_tokens_comes_whole() -> None:
    ids = BYTE_LEVEL.encode(EMOJI)
    assert len(ids) > 5
    pieces = pieces_of(BYTE_LEVEL, ids)
    assert "".join(pieces) == EMOJI
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(EMOJI)


def test_a_cut_character_comes_at_the_flush() -> None:
    ids = BYTE_LEVEL.encode("a😀")
    pieces = pieces_of(BYTE_LEVEL, ids[:-1])
    assert pieces == ["a"] + [""] * (len(ids) - 2) + ["\ufffd"]
    assert "".join(pieces) == BYTE_LEVEL.decode(ids[:-1])


def test_special_tokens_in_a_stream() -> None:
    ids = BYTE_LEVEL.encode("<|start|>fox<|end|>")
    assert "".join(pieces_of(BYTE_LEVEL, ids)) == "fox"
    assert "".join(pieces_of(BYTE_LEVEL, ids, skip=False)) == "<|start|>fox<|end|>"


def test_byte_fallback_by_hand() -> None:
    def token(text: str) -> int:
        token_id = BYTE_FALLBACK.token_to_id(text)
        assert token_id is not None
        return token_id

    ids = [token("▁Hello"), token("▁"), token("<0xF0>"), token("<0x9F>"), token("<0x98>"), token("<0x80>"), token("!")]
    assert pieces_of(BYTE_FALLBACK, ids) == ["Hello", " ", "", "", "", "", "😀!", ""]
    assert pieces_of(BYTE_FALLBACK, ids[:-1]) == ["Hello", " ", "", "", "", "", "😀"]
    assert pieces_of(BYTE_FALLBACK, ids[:-2]) == ["Hello", " ", "", "", "", "\ufffd" * 3]
    assert pieces_of(BYTE_FALLBACK, [token("▁"), token("▁world")]) == ["", " world", ""]


@pytest.mark.parametrize(
    "tokenizer",
    [BYTE_LEVEL, FUSED, BYTE_FALLBACK, METASPACE, WORDPIECE, NO_DECODER, MIXED],
    ids=["byte_level", "fused", "byte_fallback", "metaspace", "wordpiece", "no_decoder", "mixed"],
)
@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_pieces_together_equal_the_whole(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    # Any ids at all: random bytes, special and added tokens, ids that the tokenizer does not know.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    pieces = pieces_of(tokenizer, ids, skip=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=100)
@given(text=st.text("a é狐😀\u200d👧\ufffd\n", max_size=30))
def test_pieces_of_real_text_hold_whole_characters_only(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, FUSED, MIXED):
        pieces = pieces_of(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, FUSED, BYTE_FALLBACK], ids=["byte_level", "fused", "byte_fallback"])
def test_work_per_token_does_not_grow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    whole = Tokenizer.decode

    def counting(self: Tokenizer, ids: Any, *, skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return whole(self, ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    stream = TextStream(tokenizer)
    # Text, bytes that never make a character, special tokens: 6,000 of each.
    ordinary = tokenizer.encode("a" if tokenizer is not BYTE_FALLBACK else "é")[-1]
    broken = tokenizer.token_to_id("<0xFF>" if tokenizer is BYTE_FALLBACK else "ÿ")
    assert broken is not None
    tokens = 0
    for token_id in (ordinary, broken, 0):
        for _ in range(6000):
            stream.push(token_id)
            tokens += 1
    stream.flush()
    assert decoded <= 8 * tokens


def test_a_token_takes_microseconds() -> None:
    ids = BYTE_LEVEL.encode(" ".join(SENTENCES)) * 50
    stream = BYTE_LEVEL.text_stream()
    start = time.thread_time()  # whatever else the machine does
    for token_id in ids:
        stream.push(token_id)
    assert (time.thread_time() - start) / len(ids) < 200e-6
