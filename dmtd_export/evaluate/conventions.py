"""Which convention a checkpoint was trained with, by measurement: perplexity under every legal pair on the same rows.

Checkpoints in the published form do not record it. Only a checkpoint can be asked: a bundle's manifest states its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.scorer import Scorer
from dmtd_export.evaluate.statistics import Bootstrap
from dmtd_export.evaluate.subject import Subject
from dmtd_export.evaluate.text_metrics import PhaseResult, measure_text
from dmtd_export.evaluate.texts import TextWindow
from dmtd_models.config import LEGAL_CONVENTIONS

Convention = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConventionResult:
    """(cycle_origin, prompt_input) -> results over all rows; ``best`` has the lowest perplexity."""

    results: dict[Convention, PhaseResult]
    best: Convention


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
            f"--compare-conventions: {subject.path} is a bundle, which has one convention; give the checkpoint it is made of"
        )
    results: dict[Convention, PhaseResult] = {}
    for origin, prompt in LEGAL_CONVENTIONS:
        under = scorer.with_convention(replace(scorer.cycle, cycle_origin=origin, prompt_input=prompt))
        measured = measure_text(under, base, windows, bootstrap=bootstrap, on_done=on_done)
        results[origin, prompt] = measured.overall
    return ConventionResult(results=results, best=min(results, key=lambda pair: results[pair].perplexity.value))
