"""The cycle graph, one session for all: which of its parts a run is of, under the names of the graphs that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dmtd_runtime.backends.onnxruntime.binding import Binding
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import CycleInfo, GraphInfo, TensorInfo


class CycleParts:
    """full_pass, thinking and late_decode within a cycle graph, the first and the last with late steps behind them."""

    def __init__(self, graph: GraphInfo, cycle: CycleInfo) -> None:
        self._graph = graph
        self._encoding, self._decoding = set(cycle.encoding_range), set(cycle.decoding_range)
        self.most_steps = 1 + max(contract.step_of(info.name) for info in graph.outputs)
        symbols = {dim for info in graph.inputs for dim in info.dims if isinstance(dim, str)}
        self.least: Mapping[str, int] = dict.fromkeys(symbols, 1)
        """Symbolic dimensions of what a part does not read."""

    def graph(self, name: contract.GraphName, count: int) -> GraphInfo:
        """The graph with the outputs of a part, ``count`` steps of D; others would have to be bound empty."""
        thinks, steps = name != contract.LATE_DECODE, 0 if name == contract.THINKING else count
        kept = tuple(info for info in self._graph.outputs if self._gives(info, thinks, steps))
        return replace(self._graph, outputs=kept)

    def direct(self, binding: Binding, name: contract.GraphName, count: int) -> None:
        """Let a binding run a part, with the part's own names for what is filled in."""
        binding.arrays[contract.THINKS][0] = name != contract.LATE_DECODE
        binding.arrays[contract.NUM_STEPS][0] = 0 if name == contract.THINKING else count
        if name == contract.LATE_DECODE:
            binding.arrays = {**binding.arrays, contract.INPUT_IDS: binding.arrays[contract.LATE_IDS]}

    def _gives(self, info: TensorInfo, thinks: bool, steps: int) -> bool:
        cache, step = contract.cache_name(info.name), contract.step_of(info.name)
        if info.name == contract.NEW_THOUGHT:
            return thinks and not steps
        if cache is None or step or cache.layer in self._decoding:
            return step < steps
        if cache.layer in self._encoding and self._graph.slots > 1:  # written by slot, or for all of them
            return thinks == (cache.slot is not None)
        return thinks or cache.layer in self._encoding
