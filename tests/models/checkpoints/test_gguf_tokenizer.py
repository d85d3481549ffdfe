"""Tokenizers rebuilt from GGUF metadata: known splits of a tiny vocabulary, special tokens, begin and end tokens."""

import json

import pytest
from gguf_files import tiny_config, write_gguf
from tokenizers import Tokenizer, pre_tokenizers

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.checkpoints.gguf_tokenizer import tokenizer_from_metadata
from dmtd_models.reference.testing import random_weights

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["1 2", "12 3", "123 4", "4 5", "h i", "Ġ hi", "Ã ©"]
WORDS = [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{{ messages[0]['content'] }}"


def metadata(pre, *, head=("<s>", "</s>"), tail=("<tool>", "<|end|>"), unused=0, **own):
    """Special tokens before and after the vocabulary; the first of the tail is user-defined, the rest control."""
    tokens = [*head, *ALPHABET, *WORDS, *tail, *(f"[PAD{i}]" for i in range(unused))]
    types = [3] * len(head) + [1] * len(ALPHABET + WORDS) + [4, 3, 3][: len(tail)] + [5] * unused
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": MERGES,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **own,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"tokenizer.chat_template": TEMPLATE}


def make(data):
    made = tokenizer_from_metadata(data, max_len=512)
    assert made.problem is None
    return Tokenizer.from_str(made.files["tokenizer.json"].decode())


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "hi12345", ["hi", "1", "2", "3", "4", "5"]),
        ("smollm", "hi 12", ["hi", "Ġ", "1", "2"]),
        ("smollm", "a hi\n\nhi", ["a", "Ġhi", "Ċ", "Ċ", "hi"]),
        ("qwen2", "hi12345", ["hi", "1", "2", "3", "4", "5"]),
        ("qwen2", "hi 12", ["hi", "Ġ", "1", "2"]),
        ("qwen2", "e\u0301", ["Ã©"]),  # composed by NFC
        ("llama-bpe", "hi12345", ["hi", "123", "45"]),
        ("llama3", "hi 1234", ["hi", "Ġ", "123", "4"]),
        ("llama-bpe", "e\u0301", ["e", "Ì", "ģ"]),  # not composed
    ],
)
def test_splits(pre, text, expected):
    tokenizer = make(metadata(pre, add_bos_token=False))
    assert tokenizer.encode(text).tokens == expected


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("text", ["hi, 1234 wörld!  \n\t x", "日本語 🙂", "it's  3.14\r\n"])
def test_text_round_trip(pre, text):
    tokenizer = make(metadata(pre, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_whole_words_win_over_merges_in_llama3_only():
    """Its original has ignore_merges: a piece that is a token is that token, whether or not merges lead to it."""
    data = metadata("llama-bpe", add_bos_token=False)
    data["tokenizer.ggml.merges"] = ["1 2"]
    assert make(data).encode("hi").tokens == ["hi"]
    assert make({**data, "tokenizer.ggml.pre": "qwen2"}).encode("hi").tokens == ["h", "i"]


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_special_and_user_defined_tokens(pre):
    data = metadata(pre, unused=3)
    tokens = data["tokenizer.ggml.tokens"]
    tokenizer = make(data)
    encoded = tokenizer.encode("<s>hi<tool>hi<|end|>")
    assert encoded.ids == [tokens.index(token) for token in ("<s>", "hi", "<tool>", "hi", "<|end|>")]
    assert tokenizer.decode(encoded.ids) == "hi<tool>hi"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<s>hi<tool>hi<|end|>"
    assert tokenizer.get_vocab_size() == len(tokens) - 3
    assert all(tokenizer.id_to_token(i) == token for i, token in enumerate(tokens[:-3]))


def test_added_tokens_at_the_end_stay_out_of_the_model_as_in_the_originals():
    described = json.loads(tokenizer_from_metadata(metadata("qwen2"), max_len=8).files["tokenizer.json"])
    assert "<s>" in described["model"]["vocab"]
    assert "<tool>" not in described["model"]["vocab"]
    assert [(token["content"], token["special"]) for token in described["added_tokens"]] == [
        ("<s>", True),
        ("</s>", True),
        ("<tool>", False),
        ("<|end|>", True),
    ]


def test_qwen_tokens_that_only_look_special():
    data = metadata("qwen2", tail=("<tool>", "<|fim_prefix|>", "<|im_end|>"))
    tokenizer = make(data)
    assert tokenizer.decode(tokenizer.encode("<|fim_prefix|>hi<|im_end|>").ids) == "<|fim_prefix|>hi"


@pytest.mark.parametrize(
    ("pre", "own", "expected"),
    [
        ("smollm", {}, ["hi"]),
        ("smollm", {"add_bos_token": True}, ["<s>", "hi"]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "hi", "</s>"]),
        ("qwen2", {"add_eos_token": True}, ["hi", "</s>"]),
        ("llama-bpe", {}, ["<s>", "hi"]),  # what the label stands for where the file is silent
        ("llama-bpe", {"add_bos_token": False}, ["hi"]),
    ],
)
def test_begin_and_end_tokens(pre, own, expected):
    tokenizer = make(metadata(pre, **own))
    assert tokenizer.encode("hi").tokens == expected
    assert tokenizer.encode("hi", add_special_tokens=False).tokens == ["hi"]


def test_tokenizer_config():
    data = metadata("llama-bpe", padding_token_id=1)
    config = json.loads(tokenizer_from_metadata(data, max_len=512).files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "</s>", "</s>")
    assert (config["add_bos_token"], config["model_max_length"]) == (True, 512)
    assert config["chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: got 'llama'"),
        ({"tokenizer.ggml.pre": "gpt-2"}, "tokenizer.ggml.pre: got 'gpt-2'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.tokens": None}, "carries no tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.merges": ["not there"]}, "do not fit together"),
    ],
)
def test_other_tokenizers_give_a_reason_and_no_file(change, named):
    made = tokenizer_from_metadata(metadata("smollm") | change, max_len=512)
    assert named in made.problem
    assert "tokenizer.json" not in made.files
    assert made.files["chat_template.jinja"] == TEMPLATE.encode()


def test_through_a_file(tmp_path):
    data = metadata("smollm")
    config = tiny_config("llama", vocab_size=len(data["tokenizer.ggml.tokens"]), bos_token_id=0, eos_token_ids=(1,))
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config, seed=1), tokenizer=data)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tokenizer_problem is None
    assets = checkpoint.assets()
    assert set(assets) == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"),
    }
    assert Tokenizer.from_str(assets["tokenizer.json"].decode()).encode("hi 12").tokens == ["hi", "Ġ", "1", "2"]


def test_a_file_without_a_tokenizer(tmp_path):
    config = tiny_config("llama")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, random_weights(config, seed=1)))
    assert "carries no tokenizer" in checkpoint.tokenizer_problem
    assert set(checkpoint.assets()) == {"config.json", "generation_config.json"}


def test_all_named_tokens_and_the_template_for_tools() -> None:
    data = metadata("smollm") | {
        "tokenizer.ggml.seperator_token_id": 0,
        "tokenizer.ggml.mask_token_id": 1,
        "tokenizer.chat_template.tool_use": "T",
    }
    files = tokenizer_from_metadata(data, max_len=8).files
    config, tokens = json.loads(files["tokenizer_config.json"]), data["tokenizer.ggml.tokens"]
    assert (config["sep_token"], config["mask_token"]) == (tokens[0], tokens[1])
    assert files["chat_template_tool_use.jinja"] == b"T"
