"""Does quality hang on which position is a head? The same tokens, scored with the first head at every place of a cycle.

Cycles count from the end of the prompt, so a prompt that ends k tokens later moves every head by k. Over all k each token stands
once at every place: phases are compared on the same tokens, and offsets too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.scorer import Scorer, ScoreRequest, phase_name, phases
from dmtd_export.evaluate.statistics import Bootstrap
from dmtd_export.evaluate.text_metrics import PhaseResult, add_rows, by_unit, phase_result
from dmtd_export.evaluate.texts import TextWindow


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetResult:
    """``by_offset``: the first head so many tokens behind the context; ``by_phase``: every token once at every place."""

    by_offset: Mapping[str, PhaseResult]
    by_phase: Mapping[str, PhaseResult]


def measure_offsets(
    model: Scorer,
    base: Scorer,
    windows: Sequence[TextWindow],
    *,
    bootstrap: Bootstrap,
    on_done: Callable[[int], None] = lambda count: None,
) -> OffsetResult:
    """Score every window ``cycle_length`` times; rows count from where every offset has begun its first cycle.

    Raises:
        EvaluateError: cycles count from the start of the sequence, or no window is long enough.
    """
    cycle = model.cycle
    length = cycle.cycle_length
    if cycle.cycle_origin != "prompt":
        raise EvaluateError(
            "cycles of origin absolute count from the start of the sequence; no head can move", param="offsets"
        )
    windows = [window for window in windows if len(window.token_ids) > window.context_len + length]
    if not windows:
        raise EvaluateError(
            f"no window of the text has more than a cycle of {length} tokens; give longer text", param="offsets"
        )
    sums = np.zeros((len(windows), 4, length, length))  # by offset and phase
    for at, window in enumerate(windows):
        first = window.context_len + length - 1
        shifted = [window.context_len + offset for offset in range(length)]
        requests = [
            ScoreRequest(token_ids=window.token_ids, prompt_len=prompt, plain=False, first_row=first)
            for prompt in shifted
        ]
        plain = ScoreRequest(token_ids=window.token_ids, prompt_len=window.context_len, plain=True, first_row=first)
        if model is base:
            *ours, theirs = model.score([*requests, plain])
        else:
            ours, [theirs] = model.score(requests), base.score([plain])
        for offset, (prompt, mine) in enumerate(zip(shifted, ours, strict=True)):
            place = phases(cycle, prompt_len=prompt, num_rows=len(window.token_ids))[first:]
            add_rows(sums[at, :, offset], place, mine, theirs)
        on_done(1)
    units, _ = by_unit(sums, windows)
    return OffsetResult(
        by_offset={str(k): phase_result(units[:, :, k].sum(-1), bootstrap) for k in range(length)},
        by_phase={phase_name(p): phase_result(units[..., p].sum(-1), bootstrap) for p in range(length)},
    )
