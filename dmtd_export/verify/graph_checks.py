"""Each graph of a bundle against expected numbers: keys and values of every layer, thought, logits at every row.

The expected numbers come from the PyTorch reference (level ``oracle``) or from one graph pair of the bundle (level
``graphs``). They are compared in the order of computation, so the first divergence names the first wrong layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dmtd_export.verify.graph_runs import OpenSession, cache_layers, open_onnxruntime, run_graph
from dmtd_export.verify.int8_caches import FollowedGraphs, Scales
from dmtd_export.verify.margins import FLOAT32, Difference, Margin, worst_difference
from dmtd_export.verify.report import Check, Divergence, Level
from dmtd_export.verify.scenario import Outcome, Scenario
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest
from dmtd_runtime.errors import BackendError

Array = np.ndarray[Any, np.dtype[Any]]
OnDone = Callable[[], None]

# thinking first: what it gets wrong, the others may only inherit
ORDER = (contract.THINKING, contract.LATE_DECODE, contract.FULL_PASS)


def ordered(manifest: Manifest) -> list[GraphInfo]:
    """The graphs of the decoder, those of one cut together, the simplest first.

    The cycle graph is not among them, which is all of them in one: whole cycles hold it.
    """
    graphs = (graph for graph in manifest.decoder_graphs if graph.name in ORDER)
    return sorted(graphs, key=lambda graph: (ORDER.index(graph.name), graph.slots, graph.dialect))


def check_graphs(
    directory: Path,
    manifest: Manifest,
    scenario: Scenario,
    expected: Outcome,
    level: Level,
    margin: Margin = FLOAT32,
    label: str = "",
    on_done: OnDone = lambda: None,
    open_session: OpenSession = open_onnxruntime,
    scales: Scales = MappingProxyType({}),
    follow: FollowedGraphs | None = None,
) -> list[Check]:
    """Run every graph of ``manifest`` and compare; one check a graph file.

    ``scales``: of int8 caches. ``follow``: says what is expected with the codes that a graph wrote.
    """
    checks = []
    for graph in ordered(manifest):
        name = f"{graph.file}{label} against {'the reference' if level == 'oracle' else 'thinking + late_decode'}"
        try:
            run = partial(run_graph, directory / graph.file, graph, manifest.cycle, scenario)
            outcome, (wanted, told) = run(expected.thought, open_session, scales), (expected, "")
            if follow:
                wanted, told = follow(outcome.codes)
                if graph.name == contract.LATE_DECODE and not _same(wanted.thought, expected.thought):
                    # E rounded another way here than in the graph that the thought is of: D is to read what follows from that.
                    outcome = run(wanted.thought, open_session, scales)
                    wanted, told = follow(outcome.codes)
            check = compare(name, graph, scenario, wanted, outcome, level, margin)
            check = replace(check, detail=check.detail or told)
        except BackendError as error:
            found = Divergence(graph=graph.file, dialect=graph.dialect, detail=str(error))
            check = Check(name=name, level=level, ok=False, detail=str(error), divergence=found)
        checks.append(check)
        on_done()
    return checks


def _same(one: Array | None, other: Array | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def graphs_as_expected(
    directory: Path, manifest: Manifest, scenario: Scenario, scales: Scales = MappingProxyType({})
) -> Outcome:
    """What the first thinking + late_decode pair computes: the expected numbers where there is no reference."""
    outcomes: dict[str, Outcome] = {}
    thought: Array | None = None
    for graph in ordered(manifest):
        if graph.name in outcomes or graph.name == contract.FULL_PASS:
            continue
        outcomes[graph.name] = run_graph(
            directory / graph.file, graph, manifest.cycle, scenario, thought, scales=scales
        )
        thought = thought if graph.name == contract.LATE_DECODE else outcomes[graph.name].thought
    first, second = outcomes[contract.THINKING], outcomes[contract.LATE_DECODE]
    return Outcome(thought=first.thought, logits=second.logits, caches={**second.caches, **first.caches})


def compare(
    name: str, graph: GraphInfo, scenario: Scenario, expected: Outcome, got: Outcome, level: Level, margin: Margin
) -> Check:
    """Compare everything that ``graph`` computes, in the order of computation."""
    worst, first, cases = 0.0, None, 0
    for what, layer, wanted, found in _pairs(graph, expected, got):
        largest = max(
            float(np.abs(wanted[s, ..., :length, :]).max(initial=0.0)) for s, length in enumerate(scenario.lengths)
        )
        for s, length in enumerate(scenario.lengths):
            cases += length
            apart = worst_difference(wanted[s, ..., :length, :], found[s, ..., :length, :], margin, largest)
            worst = max(worst, apart.error)
            if apart.error > margin.limit and first is None:
                first = _divergence(graph, what, layer, wanted[s], found[s], length, largest, margin)
    detail = "" if first is None else str(first)
    return Check(
        name=name,
        level=level,
        ok=first is None,
        worst=worst,
        margin=margin.limit,
        unit=margin.unit,
        cases=cases,
        detail=detail,
        divergence=first,
    )


def _pairs(graph: GraphInfo, expected: Outcome, got: Outcome) -> Iterator[tuple[str, int | None, Array, Array]]:
    """(what, layer, expected, got), arrays [sequences, ..., n, width], in the order of computation."""
    for layer in cache_layers(graph):
        for kind in ("key", "value"):
            yield contract.present(layer, kind), layer, expected.caches[layer, kind], got.caches[layer, kind]
    if graph.name == contract.THINKING and got.thought is not None and expected.thought is not None:
        yield contract.THOUGHT, None, expected.thought, got.thought
    if got.logits is not None and expected.logits is not None:
        yield contract.LOGITS, None, expected.logits, got.logits


def _divergence(
    graph: GraphInfo,
    what: str,
    layer: int | None,
    expected: Array,
    got: Array,
    length: int,
    largest: float,
    margin: Margin,
) -> Divergence:
    """The first position that differs, and the worst element there."""
    at, apart = _first_position(expected, got, length, largest, margin)
    layers = cache_layers(graph)
    if layer is None:
        hint = f"{what}: all keys and values agree, so the fault lies behind those of layer {layers[-1]}"
    elif layer == layers[0]:
        hint = f"{what}: the fault lies before its attention"
    else:
        before = layers[layers.index(layer) - 1]
        where = f"in layer {layer} before its attention, or behind the keys and values of layer {before}"
        hint = f"{what}: the fault lies {where}"
    return Divergence(
        graph=graph.file,
        dialect=graph.dialect,
        layer=layer if layer is not None else layers[-1],
        position=at,
        expected=apart.expected,
        got=apart.got,
        detail=f"{apart.error:.3g} {margin.unit}; {hint}",
    )


def _first_position(expected: Array, got: Array, length: int, largest: float, margin: Margin) -> tuple[int, Difference]:
    for position in range(length):
        apart = worst_difference(expected[..., position, :], got[..., position, :], margin, largest)
        if apart.error > margin.limit:
            return position, apart
    raise AssertionError("called for rows that differ")
