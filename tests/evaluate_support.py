"""A scorer whose scores are chosen by a test: shared by the tests of what is measured with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from dmtd_export.evaluate.scorer import ScoreRequest, TokenScores
from dmtd_runtime.bundle.manifest import CycleInfo

Row = Callable[[ScoreRequest, int], tuple[float, int]]


def cycle(length: int = 3, origin: str = "prompt", prompt_input: str = "thinking") -> CycleInfo:
    """E0 T1 D1 of some cycle length."""
    return CycleInfo(
        encoding_layers=0,
        thinking_layers=1,
        decoding_layers=1,
        cycle_length=length,
        cycle_origin=origin,  # type: ignore[arg-type]
        prompt_input=prompt_input,  # type: ignore[arg-type]
        dmtd_trained=True,
    )


class FakeScorer:
    """``row(request, position)`` gives the target's log-probability and the likeliest token of a row."""

    vocab_size = 1000
    max_len = 200
    batch_hint = 4

    def __init__(self, row: Row, of: CycleInfo | None = None) -> None:
        self.cycle = of or cycle()
        self._row = row
        self.requests: list[ScoreRequest] = []

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        self.requests += requests
        made = []
        for request in requests:
            rows = [self._row(request, position) for position in range(request.first_row, len(request.token_ids))]
            made.append(
                TokenScores(
                    target_logprobs=np.array([logprob for logprob, _ in rows[:-1]]),
                    top1=np.array([token for _, token in rows]),
                )
            )
        return made

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
