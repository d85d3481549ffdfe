"""Run lengths: how many greedy DMTD tokens in a row equal the base's plain greedy decoding, from many prefixes.

Prefixes are beginnings of text ("text") and rendered questions of generation tasks ("chat"). Both models continue the same
prefix; the run ends with the first token on which they differ. Up to there both have been fed the same tokens, so a
teacher-forced row of each is exactly what decoding would choose, and nothing behind a difference is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dmtd_export.evaluate.scorer import Scorer, ScoreRequest, score_pair
from dmtd_export.evaluate.statistics import Bootstrap, Estimate
from dmtd_export.evaluate.texts import TextWindow

TEXT, CHAT = "text", "chat"
PREFIX_LENS = (16, 64)  # tokens, drawn evenly: under an absolute origin the length decides the first phase


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLengths:
    """``counts[k]`` prefixes agree for k tokens; the last entry holds those that agree for ``most`` tokens or more."""

    mean: Estimate
    counts: tuple[int, ...]
    most: int

    @property
    def prefixes(self) -> int:
        """How many prefixes were continued."""
        return sum(self.counts)


def draw_prefixes(windows: Sequence[TextWindow], count: int, seed: int) -> list[tuple[int, ...]]:
    """The beginnings of ``count`` windows, of lengths drawn from PREFIX_LENS; windows serve again where they are few.

    The beginning of a chat holds at least its prompt.
    """
    rng = np.random.default_rng(seed)
    order = [int(i) for _ in range(-(-count // len(windows))) for i in rng.permutation(len(windows))][:count]
    lengths = rng.integers(*PREFIX_LENS, size=count, endpoint=True)
    least = [window.context_len if window.is_chat else 0 for window in windows]
    return [windows[i].token_ids[: max(least[i], int(n))] for i, n in zip(order, lengths, strict=True)]


def measure_run_lengths(
    model: Scorer,
    base: Scorer,
    prefixes: Sequence[tuple[int, ...]],
    *,
    most: int,
    bootstrap: Bootstrap,
    on_done: Callable[[int], None] = lambda count: None,
) -> RunLengths:
    """Continue every prefix until model and base differ, ``most`` tokens at most."""
    step = max(1, min(model.batch_hint, base.batch_hint))
    lengths: list[int] = []
    for start in range(0, len(prefixes), step):
        part = prefixes[start : start + step]
        lengths += _runs(model, base, part, most)
        on_done(len(part))
    runs = np.array(lengths, dtype=np.float64)
    counts = np.bincount(np.array(lengths), minlength=most + 1)
    return RunLengths(
        mean=bootstrap.estimate(np.stack([runs, np.ones_like(runs)], -1), lambda s: s[..., 0] / s[..., 1]),
        counts=tuple(int(c) for c in counts),
        most=most,
    )


def _runs(model: Scorer, base: Scorer, prefixes: Sequence[tuple[int, ...]], most: int) -> list[int]:
    sequences = list(prefixes)
    running = list(range(len(prefixes)))
    for _ in range(most):
        requests = [
            ScoreRequest(
                token_ids=sequences[i],
                prompt_len=len(prefixes[i]),
                plain=False,
                first_row=len(sequences[i]) - 1,
            )
            for i in running
        ]
        ours, theirs = score_pair(model, base, requests)
        pairs = [(i, int(m.top1[-1]), int(p.top1[-1])) for i, m, p in zip(running, ours, theirs, strict=True)]
        running = [i for i, mine, plain in pairs if mine == plain]
        for i, mine, plain in pairs:
            if mine == plain:
                sequences[i] = (*sequences[i], mine)
        if not running:
            break
    return [len(s) - len(p) for s, p in zip(sequences, prefixes, strict=True)]
