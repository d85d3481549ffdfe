"""The tokenizer of a Hugging Face directory, whose facts stand in up to five files, in two: as transformers 5 reads them.

Stands under ``hf``, as ``gguf_tokenizer`` under ``gguf``. Whoever reads tokenizer.json and tokenizer_config.json afterwards
has all there is; files that say it all already are left byte for byte. The rules are those of ``AutoTokenizer``:

1. Named special tokens are tokenizer_config.json's and, where that has no ``added_tokens_decoder``, special_tokens_map.json's
   over them. A tokenizer class has defaults for names that no file gives, and tokenizer.json's padding has a token.
2. Tokens that tokenizer.json lacks come from ``added_tokens_decoder`` or, without it, from added_tokens.json, in the order of
   their ids; then the named ones and the extra ones. Flags that differ are set anew.
3. A class of transformers' own splits text by its own rules, whatever tokenizer.json says: ``_CLASSES``.

A token that would get another id than a file gives it is refused. No torch, no transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dmtd_errors.native import call_native
from dmtd_errors.words import kind_of, reason
from dmtd_models.errors import CheckpointError

logger = logging.getLogger("dmtd.models")

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_TOKENIZER, _CONFIG, _MAP, _ADDED = (
    *("tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """A tokenizer class of transformers 5: names by default, and what it puts in the place of tokenizer.json's parts."""

    named: Mapping[str, str | None]
    parts: Mapping[str, Any]
    model: Mapping[str, object] = field(default_factory=dict)


def _byte_level(*, use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _llama(legacy: bool) -> _Class:
    space = {"String": "▁"}
    decoders = [
        {"type": "Replace", "pattern": space, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    scheme = "always" if legacy else "first"
    return _Class(
        named={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        parts={
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
            "decoder": {"type": "Sequence", "decoders": decoders},
        },
        model={"fuse_unk": True, "byte_fallback": True, "unk_token": None, "ignore_merges": False},
    )


_END = "<|endoftext|>"
_SPLIT = {"type": "Split", "pattern": {"Regex": _QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
_CLASSES: Mapping[str, _Class] = MappingProxyType(
    {
        "LlamaTokenizer": _llama(legacy=False),
        "Qwen2Tokenizer": _Class(
            named={"unk_token": _END, "eos_token": _END, "pad_token": _END},
            parts={
                "normalizer": {"type": "NFC"},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT, _byte_level(use_regex=False)]},
                "decoder": _byte_level(use_regex=True),
            },
            model={"ignore_merges": False},
        ),
        "GPT2Tokenizer": _Class(
            named={"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None},
            parts={
                "normalizer": None,
                "pre_tokenizer": _byte_level(use_regex=True),
                "decoder": _byte_level(use_regex=True),
            },
            model={"ignore_merges": False},
        ),
    }
)


def complete_tokenizer(path: Path, files: Mapping[str, bytes], model_config: Mapping[str, object]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json with what the files beside them say.

    Args:
        path: of the directory, for messages.
        files: the directory's, by name; without tokenizer.json, or with one that is broken, there is nothing to do.
        model_config: config.json.

    Returns:
        Those of the two that there are or that had to be made.

    Raises:
        CheckpointError: a file that is broken, or two that contradict each other.
    """
    found = {name: files[name] for name in (_TOKENIZER, _CONFIG) if name in files}
    try:
        source = files.get(_TOKENIZER, b"").decode("utf-8")
        described: Json = json.loads(source)
        core = call_native(Tokenizer.from_str, source, quiet=True)
    except Exception:  # noqa: BLE001 - whoever reads it says what is wrong
        return found
    config = _object(path, _CONFIG, files)
    named = _merged(config, _object(path, _MAP, files))
    if config.get("split_special_tokens"):
        raise CheckpointError(
            f"{path / _CONFIG}: split_special_tokens: got true, expected false: special tokens in a prompt are read as such; "
            "set it to false"
        )
    name = _class_name(model_config, named, described)
    kind = _llama(legacy=True) if name == "LlamaTokenizer" and named.get("legacy") else _CLASSES.get(name)
    rebuilt = None
    if kind is not None:
        for key, text in kind.named.items():
            if text is None or core.token_to_id(text) is not None:
                named.setdefault(key, text)
        rebuilt = _rebuilt(described, kind)
    if described.get("padding"):
        named.setdefault("pad_token", described["padding"]["pad_token"])
    if rebuilt is not None:
        core = call_native(Tokenizer.from_str, json.dumps(rebuilt))
        _warn_of_rules(path, name, may_choose=model_config.get("model_type") != "qwen2")
    own = {int(token["id"]): _token(token) for token in described.get("added_tokens", ())}
    listed = _listed(path, config, files, named)
    if "added_tokens_decoder" not in config:
        listed |= {index: (_TOKENIZER, token) for index, token in own.items()}
    elif kind is not None:
        _refuse_lost(path, name, own.values(), {token.content for _, token in listed.values()})
    changed = _add(core, [token for _, (_, token) in sorted(listed.items())], named)
    _check_ids(path, core, listed | {index: (_TOKENIZER, token) for index, token in own.items()})
    if changed or rebuilt:
        found[_TOKENIZER] = core.to_str(pretty=True).encode()
    # The names alone: flags and extra tokens stand in tokenizer.json now.
    texts = {key: text_of(value) for key, value in named.items() if key.endswith("_token")}
    changes = {key: text for key, text in texts.items() if text != text_of(config.get(key))}
    if changes:
        found[_CONFIG] = (json.dumps(config | changes, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def text_of(token: object) -> str | None:
    """A token as text; the files write it as such or as an object with its flags."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens of a complete tokenizer_config.json, those with a name of the model's own included."""
    texts = {name: text_of(value) for name, value in _named(config).items()}
    return {name: text for name, text in texts.items() if text is not None}


def _named(config: Mapping[str, Any]) -> Json:
    """Names and tokens in the order in which transformers adds those that are new."""
    extra = config.get("extra_special_tokens")
    own = {name: value for name, value in config.items() if name.endswith("_token")}
    ordered = {name: own[name] for name in NAMED_TOKENS if name in own}
    return ordered | own | (extra if isinstance(extra, dict) else {})


def _object(path: Path, name: str, files: Mapping[str, bytes]) -> Json:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / name}: not JSON ({reason(error)}); restore the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path / name}: got {kind_of(value)}, expected an object; restore the file")
    return value


def _merged(config: Json, special_map: Json) -> Json:
    """Rule 1: tokenizer_config.json with special_tokens_map.json over it."""
    if "added_tokens_decoder" in config:
        return dict(config)
    merged = dict(config)
    for name, value in special_map.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            before = merged.get(name) or []
            value = [*before, *(token for token in value if token not in before)]
        if name != "additional_special_tokens" or not _extras(config):
            merged[name] = value
    return merged


def _listed(path: Path, config: Json, files: Mapping[str, bytes], named: Json) -> dict[int, tuple[str, AddedToken]]:
    """Rule 2: id -> (the file that gives it, the token)."""
    listed: dict[int, tuple[str, AddedToken]] = {}
    own_file = _object(path, _ADDED, files)
    try:
        if "added_tokens_decoder" in config:
            for index, token in config["added_tokens_decoder"].items():
                listed[int(index)] = (_CONFIG, _token(token))
            return listed
        special = {text_of(named.get(name)) for name in NAMED_TOKENS} | {text_of(each) for each in _extras(named)}
        for text, index in own_file.items():
            flags = {"special": text in special, "normalized": text not in special}
            listed[int(index)] = (_ADDED, AddedToken(text, **flags))
    except (TypeError, ValueError, AttributeError) as error:
        name = _CONFIG if "added_tokens_decoder" in config else _ADDED
        raise CheckpointError(f"{path / name}: its added tokens cannot be read ({error}); restore the file") from error
    return listed


def _token(value: Json) -> AddedToken:
    return AddedToken(value["content"], **{name: value[name] for name in _FLAGS if name in value})


def _extras(named: Json) -> list[Any]:
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else list(extra)


def _refuse_lost(path: Path, name: str, own: Iterable[AddedToken], listed: set[str]) -> None:
    """A class takes its tokens from ``added_tokens_decoder`` where there is one, and forgets tokenizer.json's others."""
    for token in own:
        if token.content not in listed:
            raise CheckpointError(
                f"{path / _CONFIG}: added_tokens_decoder: got no {token.content!r}, expected all added tokens of {_TOKENIZER}, "
                f"which {name} takes from here; add it, or save the tokenizer anew with transformers"
            )


def _add(core: Tokenizer, listed: Sequence[AddedToken], named: Json) -> bool:
    """Add what the tokenizer lacks; whether there was any."""
    has = {token.content: token.__getstate__() for token in core.get_added_tokens_decoder().values()}
    missing = [token for token in listed if token.__getstate__() != has.get(token.content)]
    known = {*has, *(token.content for token in missing)}
    for value in (*_named(named).values(), *_extras(named)):
        if (text := text_of(value)) is not None and text not in known:
            missing.append(_token({**(value if isinstance(value, dict) else {"content": text}), "special": True}))
            known.add(text)
    names = set(named_tokens(named).values())
    for token in missing:
        token.special = token.special or token.content in names
    core.add_tokens(missing)
    return bool(missing)


def _check_ids(path: Path, core: Tokenizer, given: Mapping[int, tuple[str, AddedToken]]) -> None:
    for index, (file, token) in given.items():
        if (got := core.token_to_id(token.content)) != index:
            raise CheckpointError(
                f"{path / file}: token {token.content!r}: got id {index}, expected {got}, which it has behind the tokens of "
                f"{_TOKENIZER}; save the tokenizer anew with transformers"
            )


def _class_name(model_config: Mapping[str, object], config: Json, described: Json) -> str:
    """The class that AutoTokenizer takes."""
    model_type = model_config.get("model_type")
    declared = str(config.get("tokenizer_class") or model_config.get("tokenizer_class") or "").removesuffix("Fast")
    if model_type == "qwen2" or (model_type == "qwen3" and not declared):
        return "Qwen2Tokenizer"
    parts = json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
    return "" if declared == "LlamaTokenizer" and '"ByteLevel"' in parts else declared


def _rebuilt(described: Json, kind: _Class) -> Json | None:
    """tokenizer.json with the class's parts and no added tokens; None where they say the same as its own."""
    model = described.get("model", {})
    if model.get("type", "BPE") != "BPE":
        return None
    rebuilt = {**described, **kind.parts, "model": {**model, **kind.model}, "added_tokens": []}
    return None if _rules(rebuilt) == _rules(described) else rebuilt


def _warn_of_rules(path: Path, name: str, *, may_choose: bool) -> None:
    """``may_choose``: whether AutoTokenizer minds the class that the directory names."""
    way = f'; to keep the file\'s, say in {_CONFIG}: "tokenizer_class": "PreTrainedTokenizerFast"' if may_choose else ""
    logger.warning(
        "%s: %s has rules of its own for splitting text, which take the place of this file's, as in transformers 5%s",
        *(path / _TOKENIZER, name, way),
    )


def _rules(described: Json) -> object:
    """What decides how text is split and joined, in one form."""
    empty = {**described, "model": {**described["model"], "vocab": {}, "merges": []}, "added_tokens": []}
    written = json.loads(call_native(Tokenizer.from_str, json.dumps({**empty, "post_processor": None})).to_str())
    decoder = written["decoder"]
    if decoder and decoder["type"] == "ByteLevel":
        decoder = "ByteLevel"  # its other fields are the pre-tokenizer's
    return _without_offsets([written["normalizer"], written["pre_tokenizer"], decoder, written["model"]])


def _without_offsets(part: Any) -> Any:
    if isinstance(part, list):
        return [_without_offsets(each) for each in part]
    if not isinstance(part, dict):
        return part
    return {name: _without_offsets(value) for name, value in part.items() if name != "trim_offsets"}
