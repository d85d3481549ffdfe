"""Prompts as callers write them, text or token ids, held to what a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Number
from typing import Any

from dmtd_runtime.errors import RequestError
from dmtd_runtime.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | Mapping) or not isinstance(prompts, Iterable):
        raise RequestError(
            f"got {type(prompts).__name__}, expected text, token ids, or a list of them", param="prompts"
        )
    listed: list[Any] = list(prompts)
    if not listed:
        raise RequestError("got an empty list, expected at least one prompt", param="prompts")
    return [listed] if isinstance(listed[0], Number) else listed


def token_ids_of(
    prompt: Prompt, tokenizer: Tokenizer | None, *, vocab_size: int, add_special_tokens: bool
) -> list[int]:
    """A prompt's token ids, at least one, all within the vocabulary.

    Raises:
        RequestError: no prompt, no tokens, an id beyond the vocabulary, or text without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "this bundle has no tokenizer: give token ids, or export a checkpoint with tokenizer.json",
                param="prompt",
            )
        ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        ids = _as_ids(prompt, vocab_size)
    if not ids:
        raise RequestError("got no tokens, expected at least one", param="prompt")
    return ids


def _as_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise RequestError(f"got {type(prompt).__name__}, expected text or a list of token ids", param="prompt")
    listed = list(prompt)
    if set(map(type, listed)) == {int} and min(listed) >= 0 and max(listed) < vocab_size:  # 50 times as fast
        return listed
    ids = []
    for token_id in listed:
        whole = isinstance(token_id, Integral) and not isinstance(token_id, bool)
        if not whole or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"got token id {token_id!r}, expected integers from 0 to {vocab_size - 1}", param="prompt"
            )
        ids.append(int(token_id))
    return ids
