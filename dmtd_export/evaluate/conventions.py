"""Which convention a checkpoint was trained with, by measurement: perplexity under every legal pair on the same rows.

Checkpoints in the published form do not record it. Only a checkpoint can be asked: a bundle's manifest states its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.scorer import Scorer
from dmtd_export.evaluate.statistics import Array, Bootstrap
from dmtd_export.evaluate.subject import Subject
from dmtd_export.evaluate.text_metrics import MODEL_NLL, TOKENS, PhaseResult, by_unit, phase_result, window_sums
from dmtd_export.evaluate.texts import TextWindow
from dmtd_models.config.model import LEGAL_CONVENTIONS

Convention = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConventionResult:
    """(cycle_origin, prompt_input) -> results over all rows; ``best`` has the lowest perplexity.

    ``as_good`` cannot be told from it: the 95% interval of the difference between their losses on the same rows holds 0.
    """

    results: dict[Convention, PhaseResult]
    best: Convention
    as_good: tuple[Convention, ...]


def measure_conventions(
    subject: Subject,
    base: Scorer,
    windows: Sequence[TextWindow],
    *,
    bootstrap: Bootstrap,
    on_done: Callable[[int], None] = lambda count: None,
) -> ConventionResult:
    """Measure every legal pair against the plain base.

    Raises:
        EvaluateError: a bundle.
    """
    from dmtd_export.evaluate.torch_scorer import TorchScorer

    scorer = subject.scorer
    if not isinstance(scorer, TorchScorer):
        raise EvaluateError(
            f"{subject.path} is a bundle, which has one convention; give the checkpoint it is made of",
            param="compare_conventions",
        )
    sums: dict[Convention, Array] = {}
    for origin, prompt in LEGAL_CONVENTIONS:
        under = scorer.with_convention(replace(scorer.cycle, cycle_origin=origin, prompt_input=prompt))
        sums[origin, prompt] = by_unit(window_sums(under, base, windows, on_done), windows)[0].sum(-1)
    results = {pair: phase_result(units, bootstrap) for pair, units in sums.items()}
    best = min(results, key=lambda pair: results[pair].perplexity.value)
    others = (pair for pair in results if pair != best)
    as_good = tuple(pair for pair in others if not _worse(sums[pair], sums[best], bootstrap))
    return ConventionResult(results=results, best=best, as_good=as_good)


def _worse(units: Array, than: Array, bootstrap: Bootstrap) -> bool:
    """Whether the loss a token is higher, with an interval that does not hold 0; sums [n, 4] of the same units."""
    pairs = np.stack((units, than), -1)
    difference = bootstrap.estimate(
        pairs, lambda s: (s[..., MODEL_NLL, 0] - s[..., MODEL_NLL, 1]) / s[..., TOKENS, 0]
    ).interval()
    return difference is not None and difference[0] > 0
