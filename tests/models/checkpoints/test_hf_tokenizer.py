"""A directory's tokenizer in two files: what AutoTokenizer makes of up to five, token by token."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dmtd_models.checkpoints.hf import HuggingFaceCheckpoint
from dmtd_models.checkpoints.hf_tokenizer import named_tokens
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


def padded() -> Tokenizer:
    core = digits()
    core.enable_padding(pad_token="<|im_start|>", pad_id=258)
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
    "padding": ("llama", padded(), {"config": {"tokenizer_class": "GPT2Tokenizer"}, "without": "pad_token"}),
    "padding and null": ("llama", padded(), {"config": {"pad_token": None}}),
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
    write_tiny_checkpoint(directory, family=family, layers=1, tokenizer=True, vocab_size=300)
    return rewrite(directory, core, files)


def rewrite(directory: Path, core: Tokenizer | None, files: dict[str, Any]) -> Path:
    if core is not None:
        core.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text()) | files.get("config", {})
    config.pop(files.get("without"), None)
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
        ({"added": [1]}, "added_tokens.json: got a list, expected an object"),
        ({"map": [1]}, "special_tokens_map.json: got a list, expected an object"),
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


def random_files(rng: random.Random) -> dict[str, Any]:
    """Tokens spread over the files, mostly without a contradiction."""
    files: dict[str, Any] = {"config": {"tokenizer_class": rng.choice(TOKENIZER_CLASSES)}}
    words = rng.sample(["<think>", "[PAD]", "<img>", "[X]", "[Y]", "[Z]", "<|im_end|>"], k=rng.randint(0, 4))
    listed = {word: 259 + i for i, word in enumerate(word for word in words if word != "<|im_end|>")}
    if rng.random() < 0.1 and listed:
        listed[next(iter(listed))] += 7
    way = rng.random()
    if way < 0.4:
        flags = ("special", "lstrip", "rstrip", "normalized", "single_word")
        files["config"]["added_tokens_decoder"] = {
            str(index): {"content": word} | {flag: rng.random() < 0.3 for flag in flags}
            for word, index in listed.items()
        }
    elif way < 0.8:
        files["added"] = listed
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "image_token")
    for name in rng.sample(names, k=rng.randint(0, 3)):
        files["config"][name] = rng.choice([*words, "<|im_start|>", None])
    if rng.random() < 0.5:
        files["map"] = {name: rng.choice([*words, "<|im_start|>"]) for name in rng.sample(names[:5], k=2)}
    if rng.random() < 0.4:
        files["config"][rng.choice(["extra_special_tokens", "additional_special_tokens"])] = rng.sample(
            words, k=len(words) // 2
        )
    return files


TOKENIZER_CLASSES = ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizerFast", None)


def check_random_directory(rng: random.Random, place: Path) -> bool:
    """Whether the directory was read; what is refused contradicts itself or is refused by transformers too."""
    transformers = pytest.importorskip("transformers")
    files, family, core = random_files(rng), rng.choice(["llama", "qwen2", "qwen3"]), rng.choice([None, digits()])
    directory = place / f"{family}-{core is None}"
    if not directory.exists():
        write(directory, family, core, {})
    for old in ("special_tokens_map.json", "added_tokens.json"):
        (directory / old).unlink(missing_ok=True)
    (directory / "tokenizer_config.json").write_text("{}")
    rewrite(directory, None, files)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
    except Exception:
        return False
    try:
        assets = HuggingFaceCheckpoint(directory).assets()
    except CheckpointError:
        added = files.get("added") or {
            token["content"]: int(index) for index, token in files["config"].get("added_tokens_decoder", {}).items()
        }
        # Their ids are others than the files give, or tokens that tokenizer.json marks are forgotten.
        core = Tokenizer.from_file(str(directory / "tokenizer.json"))
        marked = {token.content: index for index, token in core.get_added_tokens_decoder().items()}
        assert any(theirs.added_tokens_encoder.get(token) != index for token, index in (added | marked).items()), files
        return False
    core = Tokenizer.from_str(assets["tokenizer.json"].decode())
    names = named_tokens(json.loads(assets["tokenizer_config.json"]))
    known = {name: token for name, token in theirs.special_tokens_map.items() if core.token_to_id(token) is not None}
    assert {name: names.get(name) for name in known} == known, files
    for text in (*TEXTS, "".join(rng.choices([*TEXTS, "[X] ", " [PAD]", "<img>"], k=4))):
        assert core.encode(text).ids == theirs.encode(text), (files, text)
    return True


def test_random_directories_are_read_as_auto_tokenizer_reads_them(tmp_path: Path) -> None:
    rng = random.Random(3)
    assert sum(check_random_directory(rng, tmp_path) for _ in range(40)) >= 15


@pytest.mark.slow
def test_many_random_directories_are_read_as_auto_tokenizer_reads_them(tmp_path: Path) -> None:
    rng = random.Random(4)
    assert sum(check_random_directory(rng, tmp_path) for _ in range(600)) >= 250
