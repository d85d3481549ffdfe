"""The cycle graph's further steps, which choose the tokens that they feed: held to the same steps run one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.verify.cycles import Case, Variant, forced_group, opened
from dmtd_export.verify.forced import chosen_tokens
from dmtd_export.verify.margins import FLOAT32, Margin, top_two_gap
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
    """Hold the tokens that cycles choose by themselves to those chosen step by step, in the same sessions.

    A token may be another one where the two likeliest are closer than the margin; the case is then left at that.
    """
    name, tokens, found = f"tokens chosen in one go: batch {variant.batch}", 0, None
    plan, picked = CyclePlan(cycle=manifest.cycle), picks(variant, cases)
    with opened(directory, manifest, variant, cases) as backend:
        for start in range(0, len(picked), variant.batch):
            group = [replace(case, continuation=()) for case in picked[start : start + variant.batch]]
            rows = forced_group(backend, plan, variant.chunk, group, manifest.model.vocab_size)
            chosen = chosen_tokens(
                backend,
                plan,
                [case.prompt for case in group],
                [case.num_new for case in group],
                vocab_size=manifest.model.vocab_size,
                max_rows=variant.chunk,
            )
            for case, ran, own in zip(group, rows, chosen, strict=True):
                tokens += len(own)
                found = found or _other_token(case, variant, ran.logits, own, margin)
            on_cases(len(group))
    detail = "" if found is None else str(found)
    return Check(name=name, level=level, ok=found is None, cases=tokens, detail=detail, divergence=found)


def picks(variant: Variant, cases: Sequence[Case]) -> list[Case]:
    """The cases that run so: those in cycles of full length."""
    return [case for i in variant.picks(len(cases)) if not ((case := cases[i]).plain or case.leaves)]


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
