"""What a bundle's graphs and whole cycles are held to: the reference's numbers, or another graph's where there is none.

Over int8 caches the reference follows the codes that graphs wrote; see ``int8_caches``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmtd_export.verify.cycles import Case, Expected, Ran
from dmtd_export.verify.graph_checks import graphs_as_expected, ordered
from dmtd_export.verify.graph_runs import run_graph
from dmtd_export.verify.int8_caches import FollowedCycles, FollowedGraphs, Rounding, Scales
from dmtd_export.verify.scenario import Outcome, Scenario
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest

if TYPE_CHECKING:
    from dmtd_export.verify.reference import Reference

Array = np.ndarray[Any, np.dtype[Any]]


def expected_rows(
    directory: Path,
    manifest: Manifest,
    reference: Reference | None,
    scenario: Scenario,
    scales: Scales,
    done: Callable[[], None],
) -> tuple[Outcome, FollowedGraphs | None]:
    """What the scenario computes; over int8 caches with the codes of the first graph, and by those of any other."""
    if reference is None:
        return graphs_as_expected(directory, manifest, scenario, scales), None
    if not scales:
        return reference.outcome(scenario, done), None
    first = next(graph for graph in ordered(manifest) if graph.name == contract.THINKING)
    ran = run_graph(directory / first.file, first, manifest.cycle, scenario, None, scales=scales)

    def outcome(rounding: Rounding) -> Outcome:
        return reference.outcome(scenario, done, rounding)

    follow = FollowedGraphs(outcome, scales, ran.codes)
    return follow({})[0], follow


def expected_cycles(
    reference: Reference,
    cases: Sequence[Case],
    own: Sequence[Ran],
    scales: Scales,
    done: Callable[[], None],
) -> Expected:
    """The oracle's logits of whole cycles; over int8 caches with the codes that the baseline's hold."""

    def logits(numbers: Sequence[int], rounding: Rounding | None) -> list[Array]:
        some = [cases[number] for number in numbers]
        rows = reference.teacher_forced(
            [case.sequence for case in some],
            [len(case.prompt) for case in some],
            [case.plain for case in some],
            [case.heads for case in some],
            done,
            rounding,
        )
        return [row[len(case.prompt) - 1 :] for row, case in zip(rows, some, strict=True)]

    everything = range(len(cases))
    if not scales:
        return Expected(logits=logits(everything, None), level="oracle")
    follow = FollowedCycles(logits, scales)
    found, _ = follow(everything, [ran.codes for ran in own])
    return Expected(logits=found, level="oracle", follow=follow)
