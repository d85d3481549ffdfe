"""Which graphs run for some steps, bound and ready: worked out once for all runs of the same slots and row counts.

A step of one small model takes milliseconds, and finding out anew what the last one found out would be a tenth of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dmtd_runtime.backends.base import Rows, SlotStep
from dmtd_runtime.backends.layouts.layout import Layout
from dmtd_runtime.backends.onnxruntime.binding import Binding
from dmtd_runtime.bundle import contract

T = TypeVar("T")

MAX_BINDINGS = 256

Bind = Callable[[contract.GraphName, Mapping[str, int], range, bool, int], Binding]
"""(graph, sizes, slots, captured, thought_from): ``thought_from`` is the first of its rows in what thinking gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGraph:
    """A graph over some of a run's steps, those at ``places``."""

    name: contract.GraphName
    places: Sequence[int]
    binding: Binding
    wanted: bool  # whether any step wants logits
    index: Any  # of the wanted rows in its logits; None where the graph gives none


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """T over windows that go through it together, and D behind it: graphs in their order, and what they count as."""

    graphs: Sequence[PreparedGraph]
    late: bool
    prefill: bool
    refill_rows: int


class PreparedRuns:
    """Finds the runs that steps need, with their bindings; the latest ones are kept."""

    def __init__(self, layout: Layout, bind: Bind, *, fused: bool, rides: bool, joins: bool = False) -> None:
        """``fused``: a full pass is one graph. ``rides``: all parts of a run go through T together.

        ``joins``: a full pass of one part is one graph, and others are not.
        """
        self._layout, self._bind, self._fused, self._rides, self._joins = layout, bind, fused, rides, joins
        self._runs: dict[Hashable, Sequence[PreparedRun]] = {}
        self._bindings: dict[Hashable, Binding] = {}

    def of(self, steps: Sequence[SlotStep], rows: Rows, *, captured: bool) -> Sequence[PreparedRun]:
        """Those of some steps; ``captured``: with captured graphs, where steps have few shapes."""
        key = (rows, captured, *[(s.slot, s.step.kind, len(s.step.window), s.step.wants_logits) for s in steps])
        if (found := self._runs.get(key)) is not None:
            return found
        parts = self._layout.split(steps)
        groups = [parts] if self._rides else [[part] for part in parts]
        runs = [self._run(group, steps, rows, captured) for group in groups]
        if steps[-1].step.kind != "prefill":  # prompts have too many shapes to be met again
            keep(self._runs, key, runs)
        return runs

    def clear(self) -> None:
        """Let go of all."""
        self._runs.clear()
        self._bindings.clear()

    def _run(
        self, parts: Sequence[Sequence[SlotStep]], steps: Sequence[SlotStep], rows: Rows, captured: bool
    ) -> PreparedRun:
        together = [step for part in parts for step in part]
        late, places = together[0].step.kind == "late", {id(step): place for place, step in enumerate(steps)}
        fused, graphs = self._fused or (self._joins and len(parts) == 1), list[PreparedGraph]()
        last = contract.LATE_DECODE if late or not fused else contract.FULL_PASS
        if not late and not fused:
            graphs.append(self._graph(contract.THINKING, together, places, rows, captured, 0))
        for part, offset in zip(parts, self._layout.late_offsets(parts), strict=True):
            graphs.append(self._graph(last, part, places, rows, captured, offset))
        return PreparedRun(
            graphs=graphs,
            late=late,
            prefill=all(s.step.kind == "prefill" for s in together),
            refill_rows=0 if late else sum(len(s.step.window) - len(s.step.late) for s in together),
        )

    def _graph(
        self,
        name: contract.GraphName,
        part: Sequence[SlotStep],
        places: Mapping[int, int],
        rows: Rows,
        captured: bool,
        thought_from: int,
    ) -> PreparedGraph:
        sizes, slots = self._layout.sizes(name, part, rows), self._layout.batch_slots(name, part)
        # Prompts have too many shapes to keep a captured graph for each.
        captured = captured and part[0].step.kind != "prefill"
        key = (name, slots, tuple(sizes.items()), captured, thought_from)
        if (binding := self._bindings.get(key)) is None:
            binding = self._bind(name, sizes, slots, captured, thought_from)
            keep(self._bindings, key, binding)
        return PreparedGraph(
            name=name,
            places=[places[id(step)] for step in part],
            binding=binding,
            wanted=any(s.step.wants_logits for s in part),
            index=None if name == contract.THINKING else self._layout.logit_index(part, rows),
        )


def keep(kept: dict[Hashable, T], key: Hashable, value: T) -> None:
    """Keep a value in place of the oldest one, where there are many: several slots have many combinations of lengths."""
    if len(kept) == MAX_BINDINGS:
        del kept[next(iter(kept))]
    kept[key] = value
