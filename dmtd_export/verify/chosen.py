"""The cycle graph's further steps, which choose the tokens that they feed: held to the same steps run one by one, which are
held to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.verify.cycles import Case, Variant, forced_group, opened
from dmtd_export.verify.forced import chosen_tokens
from dmtd_export.verify.margins import FLOAT32, Difference, Margin, top_two_gap, worst_difference
from dmtd_export.verify.report import Check, Divergence, Level
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.cycle import CyclePlan

Array = np.ndarray[Any, np.dtype[Any]]


def check_chosen(
    directory: Path,
    manifest: Manifest,
    variant: Variant,
    cases: Sequence[Case],
    level: Level,
    margin: Margin = FLOAT32,
    on_cases: Callable[[int], None] = lambda count: None,
) -> Check:
    """Hold logits and tokens of cycles that choose by themselves to those of the same steps one by one, in the same sessions.

    A token may be another one where the two likeliest are closer than the margin; the case is then left at that.
    """
    name, found = f"tokens chosen in one go: batch {variant.batch}", None
    plan, picked = CyclePlan(cycle=manifest.cycle), picks(variant, cases)
    rows_seen, worst, seen = 0, 0.0, dict[tuple[int, int], Array]()
    with opened(directory, manifest, variant, cases) as backend:
        backend.watch_cycles(lambda slot, position, row: seen.__setitem__((slot, position), row))
        for start in range(0, len(picked), variant.batch):
            group = [replace(case, continuation=()) for case in picked[start : start + variant.batch]]
            shortest = min(case.num_new for case in group)  # all leave together, and keep their slots until then
            group = [replace(case, num_new=shortest) for case in group]
            seen.clear()
            rows = forced_group(backend, plan, variant.chunk, group, manifest.model.vocab_size)
            chosen = chosen_tokens(
                backend,
                plan,
                [case.prompt for case in group],
                [case.num_new for case in group],
                vocab_size=manifest.model.vocab_size,
                max_rows=variant.chunk,
            )
            for slot, (case, ran, own) in enumerate(zip(group, rows, chosen, strict=True)):
                same = next((k for k, row in enumerate(ran.logits) if own[k] != int(row.argmax())), len(own) - 1)
                for step in range(same + 1):
                    position = len(case.prompt) - 1 + step
                    if (row := seen.get((slot, position))) is not None:
                        apart = worst_difference(ran.logits[step], row, margin, float(np.abs(ran.logits).max()))
                        rows_seen, worst = rows_seen + 1, max(worst, apart.error)
                        if apart.error > margin.limit:
                            found = found or _other_logits(case, variant, position, apart)
                found = found or _other_token(case, variant, ran.logits, own, margin)
            on_cases(len(group))
    return Check(
        name=name,
        level=level,
        ok=found is None,
        cases=rows_seen,
        worst=worst,
        margin=margin.limit,
        unit=margin.unit,
        detail="" if found is None else str(found),
        divergence=found,
    )


def picks(variant: Variant, cases: Sequence[Case]) -> list[Case]:
    """The cases that run so: those in cycles of full length."""
    return [case for i in variant.picks(len(cases)) if not ((case := cases[i]).plain or case.leaves)]


def _other_logits(case: Case, variant: Variant, position: int, apart: Difference) -> Divergence:
    return Divergence(
        graph=contract.CYCLE,
        dialect=variant.dialect,
        position=position,
        expected=apart.expected,
        got=apart.got,
        detail=f"logits; prompt of {len(case.prompt)}, batch {variant.batch}",
    )


def _other_token(case: Case, variant: Variant, rows: Array, chosen: Sequence[int], margin: Margin) -> Divergence | None:
    """Where tokens first are others than the likeliest by ``rows``, and not nearly as likely."""
    for step, (row, token) in enumerate(zip(rows, chosen, strict=True)):
        if token != (best := int(row.argmax())):
            near = top_two_gap(row) <= margin.limit * margin.scale(float(np.abs(rows).max()))
            found = Divergence(
                graph=contract.CYCLE,
                dialect=variant.dialect,
                position=len(case.prompt) - 1 + step,
                expected=str(best),
                got=str(token),
                detail=f"token; prompt of {len(case.prompt)}, batch {variant.batch}",
            )
            return None if near else found
    return None
