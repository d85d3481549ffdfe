"""A directory's tokenizer in two files: what AutoTokenizer makes of up to five, token by token."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dmtd_models.checkpoints.hf import HuggingFaceCheckpoint
from dmtd_models.errors import CheckpointError
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.text.special_tokens import read_special_tokens
from dmtd_runtime.text.tokenizer import Tokenizer as RuntimeTokenizer

TEXTS = (
    *(
        "a<think>b",
        "<|im_start|>user\nhi [PAD]<|im_end|>\n",
        "Zürich  2024 €",
        "e\u0301 x\n\n  y",
        "<s>a</s><s> b <unk>",
    ),
    *("a <img> b", " lead", "", "don't [X]  [Y] [Z]"),
)


def metaspace() -> Tokenizer:
    """A tokenizer of Llama 2's kind, as the first converters wrote it: the spaces are the normalizer's."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "h", "i"]
    core = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


def digits() -> Tokenizer:
    """A byte-level tokenizer of SmolLM's kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "ĠĠ"])}, [("Ġ", "Ġ")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return core


THINK = {"259": {"content": "<think>", "special": False, "normalized": False}}
CASES: dict[str, tuple[str, Tokenizer | None, dict[str, Any]]] = {
    "complete": ("qwen3", None, {}),
    "added_tokens_decoder": ("qwen3", None, {"config": {"added_tokens_decoder": THINK}}),
    "flags anew": (
        "qwen3",
        None,
        {"config": {"added_tokens_decoder": {"258": {"content": "<|im_end|>", "special": True, "lstrip": True}}}},
    ),
    "added_tokens.json": ("qwen3", None, {"added": {"<think>": 259, "[PAD]": 260}, "map": {"pad_token": "[PAD]"}}),
    "special_tokens_map": (
        "llama",
        None,
        {
            "config": {"eos_token": "<|endoftext|>"},
            "map": {
                "eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False},
                "mask_token": {"content": "[X]", "lstrip": True, "single_word": False},
                "extra_special_tokens": ["[Y]", {"content": "[Z]", "rstrip": True}],
            },
        },
    ),
    "the map is not read beside a decoder": (
        "llama",
        None,
        {"config": {"added_tokens_decoder": {}}, "map": {"pad_token": "[PAD]"}, "added": {"<think>": 259}},
    ),
    "names of its own": (
        "qwen3",
        None,
        {"config": {"image_token": "<img>", "extra_special_tokens": {"begin_of_thought": "<think>"}}},
    ),
    "extra tokens by their old name": (
        "llama",
        None,
        {"config": {"additional_special_tokens": ["[Y]", "[Z]"]}, "map": {"additional_special_tokens": ["[Y]"]}},
    ),
    "extra tokens": ("llama", None, {"config": {"extra_special_tokens": ["[Y]", "[Z]"], "unk_token": "[X]"}}),
    "qwen2's class": ("qwen2", None, {"added": {"<think>": 259}}),
    "qwen3's class": ("qwen3", None, {"config": {"tokenizer_class": "Qwen2Tokenizer"}}),
    "no class": ("qwen3", None, {"config": {"tokenizer_class": None}}),
    "gpt2's class": ("llama", digits(), {"config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": None}}),
    "any class": ("llama", digits(), {}),
    "llama's class over bytes": ("llama", digits(), {"config": {"tokenizer_class": "LlamaTokenizerFast"}}),
    **{
        f"llama's class {legacy}": (
            "llama",
            metaspace(),
            {
                "config": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
                | {"pad_token": None, "legacy": legacy},
                "added": {"<think>": 265},
            },
        )
        for legacy in (False, True, None)
    },
}


def write(directory: Path, family: str, core: Tokenizer | None, files: dict[str, Any]) -> Path:
    write_tiny_checkpoint(directory, family=family, layers=2, tokenizer=True, vocab_size=300)
    if core is not None:
        core.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text()) | files.get("config", {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in (("special_tokens_map", files.get("map")), ("added_tokens", files.get("added"))):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", CASES)
def test_the_ids_and_names_of_auto_tokenizer(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = write(tmp_path / "model", *CASES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    made = tmp_path / "made"
    made.mkdir()
    for file, content in HuggingFaceCheckpoint(source).assets().items():
        (made / file).write_bytes(content)
    ours = RuntimeTokenizer.from_directory(made)
    assert ours is not None
    assert read_special_tokens(made) == theirs.special_tokens_map
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text
    # What a bundle has is to transformers what the directory was.
    again = transformers.AutoTokenizer.from_pretrained(made)
    assert [again.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


def test_files_that_say_it_all_stay_as_they_are(tmp_path: Path) -> None:
    source = write(tmp_path, "qwen3", None, {"config": {"added_tokens_decoder": {}}, "map": {"pad_token": "[PAD]"}})
    assets = HuggingFaceCheckpoint(source).assets()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert assets[name] == (source / name).read_bytes()
    assert "added_tokens.json" not in assets


def test_rules_that_a_class_replaces_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dmtd"):
        checkpoint = HuggingFaceCheckpoint(write(tmp_path, *CASES["gpt2's class"]))
        assert checkpoint.assets() == checkpoint.assets()
    [line] = caplog.messages
    assert line.startswith(f"{tmp_path / 'tokenizer.json'}: GPT2Tokenizer has rules of its own")
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in line


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added": {"<think>": 270}}, "added_tokens.json: token '<think>': got id 270, expected 259"),
        ({"added": {"<|im_end|>": 3}}, "added_tokens.json: token '<|im_end|>': got id 3, expected 258"),
        (
            {"config": {"added_tokens_decoder": {"270": {"content": "<think>"}}}},
            "tokenizer_config.json: token '<think>': got id 270, expected 259",
        ),
        ({"config": {"added_tokens_decoder": {"x": "y"}}}, "tokenizer_config.json: its added tokens cannot be read"),
        ({"added": [1]}, "added_tokens.json: got a JSON list, expected an object"),
        ({"map": [1]}, "special_tokens_map.json: got a JSON list, expected an object"),
        ({"config": {"split_special_tokens": True}}, "tokenizer_config.json: split_special_tokens: got true"),
    ],
)
def test_files_that_contradict_each_other_are_named(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(write(tmp_path, "qwen3", None, files))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.assets()
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_the_template_for_tools_comes_along(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    source = write(tmp_path, "qwen3", None, {"config": {"chat_template": several}})
    assets = HuggingFaceCheckpoint(source).assets()
    assert (assets["chat_template.jinja"], assets["chat_template_tool_use.jinja"]) == (b"D", b"T")
    (source / "chat_template.jinja").write_text("own file")
    assert "chat_template_tool_use.jinja" not in HuggingFaceCheckpoint(source).assets()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("own")
    assert HuggingFaceCheckpoint(source).assets()["chat_template_tool_use.jinja"] == b"own"
