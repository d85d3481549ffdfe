"""The seam of evaluation: teacher-forced scores of known tokens, whoever computes them.

    texts, tasks --> ScoreRequest --> Scorer (torch_scorer | bundle_scorer) --> TokenScores --> metrics

A scorer feeds a known sequence under the DMTD pattern, or plain, and says of every row how likely the next token was and
which token was likeliest. No array of [n, vocab] crosses the seam. A row is the position whose token was fed; it predicts
the token behind it. Decoding, text and statistics are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_runtime.bundle.manifest import CycleInfo

Array = np.ndarray[Any, np.dtype[Any]]

PROMPT_PHASE = -1  # rows of a prompt where cycles count from its end


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One known sequence. Rows before ``first_row`` are computed but not scored."""

    token_ids: tuple[int, ...]
    prompt_len: int  # the first tokens, 1 or more, that count as the prompt
    plain: bool
    first_row: int = 0

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        assert 1 <= self.prompt_len <= n, f"prompt_len {self.prompt_len} of a sequence of {n}"
        assert 0 <= self.first_row < n, f"first_row {self.first_row} of a sequence of {n}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Scores of rows ``first_row`` .. n - 1 of a sequence of n tokens.

    ``target_logprobs`` float64 [n - 1 - first_row], of the token behind each row (nothing stands behind the last one);
    ``top1`` int64 [n - first_row], the likeliest token of each row.
    """

    target_logprobs: Array
    top1: Array


class Scorer(Protocol):
    """One opened model. Not thread-safe."""

    @property
    def cycle(self) -> CycleInfo:
        """The split and the convention in force."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def max_len(self) -> int:
        """The longest sequence that can be scored."""

    @property
    def batch_hint(self) -> int:
        """How many sequences to hand over at a time where the caller is free to choose."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """Score sequences, in order.

        Raises:
            EvaluateError: a sequence that is too long, or a token outside the vocabulary.
        """

    def close(self) -> None:
        """Free the model."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


ScorePair = Callable[[Scorer, Scorer, Sequence[ScoreRequest]], tuple[list[TokenScores], list[TokenScores]]]
"""Scores of a model and its base over the same sequences."""


def phases(cycle: CycleInfo, *, prompt_len: int, num_rows: int) -> Array:
    """Place of every row in its cycle, int64 [num_rows]: 0 is a head, PROMPT_PHASE a prompt row without a cycle."""
    rows = np.arange(num_rows)
    if cycle.cycle_origin == "absolute":
        return rows % cycle.cycle_length
    return np.where(rows < prompt_len, PROMPT_PHASE, (rows - prompt_len) % cycle.cycle_length)


def phase_name(phase: int) -> str:
    """How a phase is called in reports."""
    return "prompt" if phase == PROMPT_PHASE else str(phase)


def score_pair(
    model: Scorer, base: Scorer, requests: Sequence[ScoreRequest]
) -> tuple[list[TokenScores], list[TokenScores]]:
    """The model under its pattern and the base in plain mode over the same sequences; one call where both are one model.

    ``requests`` are those of the model; a scorer that gets a sequence in both modes at once shares what they share.
    """
    plain = [
        ScoreRequest(token_ids=r.token_ids, prompt_len=r.prompt_len, plain=True, first_row=r.first_row)
        for r in requests
    ]
    if model is not base:
        return model.score(requests), base.score(plain)
    both = model.score([request for pair in zip(requests, plain, strict=True) for request in pair])
    return both[::2], both[1::2]


def score_alike(
    model: Scorer, base: Scorer, requests: Sequence[ScoreRequest], *, plain: bool
) -> tuple[list[TokenScores], list[TokenScores]]:
    """Both in one mode, plain or under the pattern that they share."""
    made = [replace(request, plain=plain) for request in requests]
    return model.score(made), base.score(made)


def check_request(request: ScoreRequest, max_len: int, vocab_size: int) -> None:
    """Refuse what a model cannot take.

    Raises:
        EvaluateError: with the numbers.
    """
    if len(request.token_ids) > max_len:
        raise EvaluateError(
            f"sequence: got {len(request.token_ids)} tokens, expected at most {max_len}, the model's limit"
        )
    low, high = min(request.token_ids), max(request.token_ids)
    if low < 0 or high >= vocab_size:
        raise EvaluateError(f"token ids: got {low if low < 0 else high}, expected 0 to {vocab_size - 1}")
