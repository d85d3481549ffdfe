"""What quantised weights and caches cost: a bundle against one of the same split in other formats, plain and in cycles.

Beside the comparison with the plain base, which counts what DMTD costs: here both sides run alike, so that what differs is
the formats. At heads and late steps apart, for the same rounding may be amplified where fewer layers follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dmtd_export.evaluate.scorer import Scorer, score_alike
from dmtd_export.evaluate.statistics import Bootstrap
from dmtd_export.evaluate.text_metrics import TextResult, measure_text
from dmtd_export.evaluate.texts import TextWindow


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatCost:
    """``plain``: both decode plainly, ``cycles``: both in cycles; ratios are of the model's perplexity to the base's."""

    plain: TextResult
    cycles: TextResult


def measure_format_cost(
    model: Scorer,
    base: Scorer,
    windows: Sequence[TextWindow],
    *,
    bootstrap: Bootstrap,
    on_done: Callable[[int], None] = lambda count: None,
) -> FormatCost:
    """Score every window four times; both must have one split and convention."""
    assert model.cycle == base.cycle, "splits are compared before"
    plain, cycles = (
        measure_text(model, base, windows, bootstrap=bootstrap, on_done=on_done, score=partial(score_alike, plain=mode))
        for mode in (True, False)
    )
    return FormatCost(plain=plain, cycles=cycles)
