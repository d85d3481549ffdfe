"""What a backend over graphs needs of a layout: ``packed.py`` and ``rectangular.py`` are the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dmtd_runtime.backends.base import Array, Rows, SlotStep
from dmtd_runtime.bundle import contract


class Layout(Protocol):
    """How the rows of several slots become the inputs of one graph."""

    def split(self, steps: Sequence[SlotStep]) -> Sequence[Sequence[SlotStep]]:
        """The runs that these steps need: the parts that may go together."""
        ...

    def batch_slots(self, graph: contract.GraphName, steps: Sequence[SlotStep]) -> range:
        """The slots that are the batch of the run."""
        ...

    def late_offsets(self, parts: Sequence[Sequence[SlotStep]]) -> Sequence[int]:
        """Where the late rows of each part begin in what one run of thinking over all of them gives."""
        ...

    def sizes(self, graph: contract.GraphName, steps: Sequence[SlotStep], rows: Rows = "last") -> Mapping[str, int]:
        """Symbolic dimensions of the run; with equal sizes and batch slots, runs share a binding."""
        ...

    def fill(
        self, graph: contract.GraphName, arrays: Mapping[str, Array], steps: Sequence[SlotStep], fed: Sequence[int]
    ) -> None:
        """Write every input of the run; ``fed`` are the committed rows of all slots."""
        ...

    def logit_index(self, steps: Sequence[SlotStep], rows: Rows = "last") -> Any:
        """Index of the wanted rows in the logits output."""
        ...
