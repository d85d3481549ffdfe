"""Perplexity and top-1 agreement over text, by phase, against the plain base model on the same rows.

TextWindow --> score_pair --> sums a document --> TextResult
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmtd_export.evaluate.scorer import (
    ScorePair,
    Scorer,
    ScoreRequest,
    TokenScores,
    phase_name,
    phases,
    score_pair,
)
from dmtd_export.evaluate.statistics import Array, Bootstrap, Estimate
from dmtd_export.evaluate.texts import TextWindow

MIN_DOCUMENTS = 10  # with fewer, windows are the units of the bootstrap

# Sums kept for every unit and phase.
MODEL_NLL, BASE_NLL, TOKENS, AGREED = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseResult:
    """Over the rows of one phase, or all rows."""

    tokens: int
    perplexity: Estimate
    base_perplexity: Estimate
    ratio: Estimate
    agreement: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class TextResult:
    """``by_phase`` by phase name, ``by_source`` by corpus; ``unit`` is what the bootstrap draws, of a corpus with fewer than
    ``MIN_DOCUMENTS`` its windows.
    """

    overall: PhaseResult
    by_phase: Mapping[str, PhaseResult]
    by_source: Mapping[str, PhaseResult]
    windows: int
    documents: int
    unit: str


def measure_text(
    model: Scorer,
    base: Scorer,
    windows: Sequence[TextWindow],
    *,
    bootstrap: Bootstrap,
    on_done: Callable[[int], None] = lambda count: None,
    score: ScorePair = score_pair,
) -> TextResult:
    """Score every window; the first tokens of each are its prompt, and their rows are not counted."""
    return summarise(window_sums(model, base, windows, on_done, score), windows, bootstrap)


def window_sums(
    model: Scorer,
    base: Scorer,
    windows: Sequence[TextWindow],
    on_done: Callable[[int], None] = lambda count: None,
    score: ScorePair = score_pair,
) -> Array:
    """Of every window and phase, float64 [windows, 4, phases]."""
    sums = np.zeros((len(windows), 4, model.cycle.cycle_length))
    step = max(1, min(model.batch_hint, base.batch_hint))
    for start in range(0, len(windows), step):
        part = windows[start : start + step]
        requests = [
            ScoreRequest(token_ids=w.token_ids, prompt_len=w.context_len, plain=False, first_row=w.context_len)
            for w in part
        ]
        ours, theirs = score(model, base, requests)
        for at, (mine, plain) in enumerate(zip(ours, theirs, strict=True), start):
            rows, context_len = len(mine.target_logprobs), windows[at].context_len
            phase = phases(model.cycle, prompt_len=context_len, num_rows=context_len + rows)[context_len:]
            add_rows(sums[at], phase, mine, plain)
        on_done(len(part))
    return sums


def summarise(sums: Array, windows: Sequence[TextWindow], bootstrap: Bootstrap) -> TextResult:
    """Sums [windows, 4, phases] as estimates."""
    units, by_document = by_unit(sums, windows)

    def of_source(source: str) -> PhaseResult:
        chosen = [i for i, w in enumerate(windows) if w.source == source]
        own, _ = by_unit(sums[chosen], [windows[i] for i in chosen])
        return phase_result(own.sum(-1), bootstrap)

    return TextResult(
        overall=phase_result(units.sum(-1), bootstrap),
        by_phase={phase_name(p): phase_result(units[..., p], bootstrap) for p in range(sums.shape[-1])},
        by_source={source: of_source(source) for source in dict.fromkeys(w.source for w in windows)},
        windows=len(windows),
        documents=len({(w.source, w.text_id) for w in windows}),
        unit="document" if by_document else "window",
    )


def add_rows(sums: Array, phase: Array, mine: TokenScores, plain: TokenScores) -> None:
    """Add the rows of a sequence that have a target to ``sums`` [4, phases]; ``phase`` of each of them."""
    rows = len(mine.target_logprobs)
    values = (-mine.target_logprobs, -plain.target_logprobs, np.ones(rows), mine.top1 == plain.top1)
    for kind, value in enumerate(values):
        np.add.at(sums[kind], phase[:rows], value[:rows])


def by_unit(sums: Array, windows: Sequence[TextWindow]) -> tuple[Array, bool]:
    """Sums [windows, ...] as those of the bootstrap's units, and whether these are documents: where there are enough."""
    documents = list(dict.fromkeys((w.source, w.text_id) for w in windows))
    if len(documents) < MIN_DOCUMENTS:
        return sums, False
    place = {document: index for index, document in enumerate(documents)}
    made = np.zeros((len(documents), *sums.shape[1:]))
    np.add.at(made, [place[w.source, w.text_id] for w in windows], sums)
    return made, True


def phase_result(units: Array, bootstrap: Bootstrap) -> PhaseResult:
    """Estimates of units [n, 4]."""

    def of(statistic: Callable[[Array], Array]) -> Estimate:
        return bootstrap.estimate(units, statistic)

    return PhaseResult(
        tokens=int(units[:, TOKENS].sum()),
        perplexity=of(lambda s: np.exp(s[..., MODEL_NLL] / s[..., TOKENS])),
        base_perplexity=of(lambda s: np.exp(s[..., BASE_NLL] / s[..., TOKENS])),
        ratio=of(lambda s: np.exp((s[..., MODEL_NLL] - s[..., BASE_NLL]) / s[..., TOKENS])),
        agreement=of(lambda s: s[..., AGREED] / s[..., TOKENS]),
    )
