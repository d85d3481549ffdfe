"""Tokens and their log probabilities as OpenAI's answers write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dmtd_runtime.serving.outputs import TokenLogprob
from dmtd_runtime.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has not."""


class TokenTexts:
    """Token ids as text; ``as_ids``: as "token_id:17", which no two tokens share."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, token_id: int) -> str:
        """One token; bytes that are no whole character become U+FFFD."""
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")

    def raw(self, token_id: int) -> list[int] | None:
        """One token's bytes."""
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))


def chat_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``logprobs`` of a chat's choice or delta."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text(token_id), "logprob": _finite(logprob), "bytes": texts.raw(token_id)}

    return {
        "content": [
            entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*other) for other in each.top]}
            for each in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(
    texts: TokenTexts, logprobs: Sequence[TokenLogprob | None], token_ids: Sequence[int], *, offset: int
) -> dict[str, Any]:
    """``logprobs`` of a completion's choice; ``offset``: characters of the text before it. None: a prompt's first token."""
    told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, each in zip(token_ids, logprobs, strict=True):
        text = texts.text(token_id)
        told["tokens"].append(text)
        told["text_offset"].append(offset)
        offset += len(text)
        told["token_logprobs"].append(None if each is None else _finite(each.logprob))
        told["top_logprobs"].append(None if each is None else _top(texts, each))
    return told


def prompt_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each token of the prompt but the first, {token id: {logprob, rank, decoded_token}}."""

    def entries(each: TokenLogprob) -> dict[str, Any]:
        ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(each.top, 1)}
        found: dict[int, tuple[float, int | None]] = {each.token_id: (each.logprob, None), **ranked}
        return {
            str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": texts.text(token_id)}
            for token_id, (logprob, rank) in found.items()
        }

    return [None if each is None else entries(each) for each in logprobs]


def _top(texts: TokenTexts, each: TokenLogprob) -> dict[str, float]:
    """The likeliest by text, and the chosen one; of two tokens with one text the likelier stands."""
    top: dict[str, float] = {}
    for token_id, logprob in (*each.top, (each.token_id, each.logprob)):
        text = texts.text(token_id)
        top[text] = max(top.get(text, -math.inf), _finite(logprob))
    return top


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
