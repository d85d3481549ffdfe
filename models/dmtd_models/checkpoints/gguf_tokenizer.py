"""The Hugging Face tokenizer of a GGUF file, rebuilt from its metadata. No torch, no transformers.

Stands under ``gguf``. Byte-level BPE only, for the pre-tokenizers named in ``_PRE_TOKENIZERS``: a GGUF file
names its pre-tokenizer by a label instead of describing it, so each must be known to give the original's tokens.
Other kinds get no tokenizer.json but a reason; the model still works on token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Tokenizer

from dmtd_errors.native import call_native
from dmtd_models.checkpoints.protocol import CHAT_TEMPLATE, TOOL_USE_TEMPLATE

_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_THE_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAMES = {  # GGUF's own spelling
    **{"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"},
    **{"sep_token": "seperator", "cls_token": "cls", "mask_token": "mask"},
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """Files by name; ``problem`` says why tokenizer.json is not among them."""

    files: Mapping[str, bytes]
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _PreTokenizer:
    """What a label of ``tokenizer.ggml.pre`` stands for. ``digits``: each digit apart, then GPT-2's own pattern."""

    pattern: str | None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False  # where the file does not say
    # Added tokens that GGUF files call control tokens by their looks; the original's text output keeps them.
    not_special: frozenset[str] = frozenset()


_LLAMA3 = _PreTokenizer(pattern=_CONTRACTIONS_AND_WORDS + r"\p{N}{1,3}" + _THE_REST, ignore_merges=True, adds_bos=True)
_PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = MappingProxyType(
    {
        "smollm": _PreTokenizer(pattern=None, digits=True),
        "qwen2": _PreTokenizer(
            pattern=_CONTRACTIONS_AND_WORDS + r"\p{N}" + _THE_REST,
            nfc=True,
            not_special=frozenset(
                f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
            ),
        ),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
    }
)


def tokenizer_from_metadata(metadata: Mapping[str, object], *, max_len: int) -> TokenizerFiles:
    """Make tokenizer.json, tokenizer_config.json and chat_template.jinja as far as the metadata allows.

    Args:
        metadata: the file's key-value pairs.
        max_len: the longest sequence, for ``model_max_length``.
    """
    files: dict[str, bytes] = {}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files[CHAT_TEMPLATE] = template.encode()
    tool_use = metadata.get("tokenizer.chat_template.tool_use")
    if isinstance(tool_use, str):
        files[TOOL_USE_TEMPLATE] = tool_use.encode()
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return TokenizerFiles(files=files, problem="the GGUF file carries no tokenizer (tokenizer.ggml.tokens)")
    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        return TokenizerFiles(
            files=files, problem=f"tokenizer.ggml.model: got {kind!r}, expected 'gpt2' (byte-level BPE)"
        )
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        return TokenizerFiles(files=files, problem=f"tokenizer.ggml.pre: got {pre!r}, expected one of {known}")
    made = _tokenizer_json(metadata, tokens, _PRE_TOKENIZERS[pre])
    if isinstance(made, str):
        return TokenizerFiles(files=files, problem=made)
    files["tokenizer.json"] = made.to_str(pretty=True).encode()
    files["tokenizer_config.json"] = _tokenizer_config(metadata, tokens, _PRE_TOKENIZERS[pre], max_len)
    return TokenizerFiles(files=files, problem=None)


def _tokenizer_json(metadata: Mapping[str, object], tokens: list[str], pre: _PreTokenizer) -> Tokenizer | str:
    """The tokenizer, or why it cannot be made."""
    types, merges = metadata.get("tokenizer.ggml.token_type"), metadata.get("tokenizer.ggml.merges")
    if not isinstance(types, list) or len(types) != len(tokens) or not isinstance(merges, list):
        return "tokenizer.ggml.token_type or tokenizer.ggml.merges is missing or too short"
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        return "tokenizer.ggml.tokens or tokenizer.ggml.merges holds something that is no text"
    added = [i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)]
    used = [i for i, kind in enumerate(types) if kind != _UNUSED]
    in_model = _ids_in_model(added, used)
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, tokens[i], special=types[i] == _CONTROL and tokens[i] not in pre.not_special) for i in added
        ],
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": _pre_tokenizer(pre),
        "post_processor": _post_processor(metadata, tokens, pre),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {tokens[i]: i for i in in_model},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    try:
        made = call_native(Tokenizer.from_str, json.dumps(described), quiet=True)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        return f"the tokenizer's data do not fit together ({error})"
    # The library renumbers added tokens that do not follow the vocabulary without a gap.
    moved = next((i for i in used if made.token_to_id(tokens[i]) != i), None)
    if moved is not None:
        return f"token {tokens[moved]!r} would get id {made.token_to_id(tokens[moved])}, expected {moved}"
    return made


def _ids_in_model(added: list[int], used: list[int]) -> list[int]:
    """Ids of the BPE vocabulary. Added tokens after its end stay outside, as the originals have them."""
    plain = sorted(set(used) - set(added))
    tail = [i for i in added if i > plain[-1]] if plain else []
    outside = set(tail) if plain and tail == list(range(plain[-1] + 1, plain[-1] + 1 + len(tail))) else set()
    return [i for i in used if i not in outside]


def _added_token(index: int, content: str, *, special: bool) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **flags, "special": special}


def _byte_level(*, use_regex: bool) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _pre_tokenizer(pre: _PreTokenizer) -> dict[str, object]:
    first: dict[str, object]
    if pre.digits:
        first = {"type": "Digits", "individual_digits": True}
    else:
        first = {"type": "Split", "pattern": {"Regex": pre.pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex=pre.pattern is None)]}


def _adds(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.add_{name}_token")
    return value if isinstance(value, bool) else default


def _special(metadata: Mapping[str, object], tokens: list[str], name: str) -> tuple[int, str] | None:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if isinstance(index, int) and 0 <= index < len(tokens):
        return index, tokens[index]
    return None


def _post_processor(metadata: Mapping[str, object], tokens: list[str], pre: _PreTokenizer) -> dict[str, object] | None:
    """Beginning and end tokens around the text, where the model wants them."""
    bos = _special(metadata, tokens, "bos") if _adds(metadata, "bos", pre.adds_bos) else None
    eos = _special(metadata, tokens, "eos") if _adds(metadata, "eos", False) else None
    if bos is None and eos is None:
        return None
    before = [{"SpecialToken": {"id": bos[1], "type_id": 0}}] if bos else []
    after = [{"SpecialToken": {"id": eos[1], "type_id": 0}}] if eos else []
    single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after]
    second = [{key: {**value, "type_id": 1} for key, value in item.items()} for item in single]
    for item in second:
        if "Sequence" in item:
            item["Sequence"]["id"] = "B"
    named = {pair[1]: {"id": pair[1], "ids": [pair[0]], "tokens": [pair[1]]} for pair in (bos, eos) if pair}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": named}


def _tokenizer_config(metadata: Mapping[str, object], tokens: list[str], pre: _PreTokenizer, max_len: int) -> bytes:
    # The generic class takes tokenizer.json as it is; the families' own classes rebuild it.
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds(metadata, "bos", pre.adds_bos),
        "add_eos_token": _adds(metadata, "eos", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
    }
    for key, name in _NAMES.items():
        special = _special(metadata, tokens, name)
        if special is not None:
            config[key] = special[1]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
