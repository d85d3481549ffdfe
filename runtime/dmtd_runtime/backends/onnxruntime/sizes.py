"""How large the tensors of an ONNX Runtime backend get, and what a device must have free for them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmtd_runtime.backends.base import PREFILL_ROUNDING
from dmtd_runtime.backends.kv_cache import kv_bytes
from dmtd_runtime.backends.onnxruntime.weights import weight_bytes
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import DTYPE_BYTES, GraphInfo, Manifest

logger = logging.getLogger("dmtd.onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class OrtSizes:
    """What decides sizes: ``slots`` of the caches, with room for ``capacity`` rows; rows ``packed`` or rectangular.

    ``prompts_ride``: a pass of T may hold the windows of heads and chunks of several prompts.
    """

    manifest: Manifest
    graphs: Sequence[GraphInfo]
    slots: int
    capacity: int
    packed: bool
    prompts_ride: bool

    @property
    def symbols(self) -> dict[str, int]:
        """Symbolic dimensions of a graph at their largest."""
        rows, tau = self.manifest.model.max_window, self.manifest.cycle.cycle_length
        sizes = {"batch": self.slots, "late_len": rows, "window_len": rows, "num_logits": self.slots}
        if self.packed:
            sizes["window_len"] = max(rows, self.slots * tau) + self.slots
            sizes |= {contract.slot_len(slot): rows for slot in range(self.slots)}
        return sizes

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The largest shapes of thought and logits."""
        model, rows = self.manifest.model, self.manifest.model.max_window
        late_rows = max(self.slots, rows) if self.packed else self.slots * rows
        if self.packed and self.prompts_ride:  # heads, then prompts, each rounded up
            late_rows = self.slots + 2 * rows + self.slots * PREFILL_ROUNDING[0]
        logits = {contract.logits(contract.step_of(info.name)) for graph in self.graphs for info in graph.outputs}
        return {
            contract.THOUGHT: (late_rows, model.hidden_size),
            **dict.fromkeys(logits | {contract.LOGITS}, (self.slots, model.vocab_size)),
        }

    def needed_bytes(self) -> dict[str, int]:
        """What a device must have free, in the words of the refusal."""
        logits = math.prod(self.outputs[contract.LOGITS]) * DTYPE_BYTES["float32"]
        return {
            "weights": weight_bytes(self.manifest, self.graphs),
            f"caches of {self.slots} x {self.capacity} rows": kv_bytes(self.manifest.model, self.slots * self.capacity),
            "activations": logits + self._arena_bytes(),
        }

    def warn_of_copies(self) -> None:
        """The standard dialect on a GPU: what each full pass copies, where that is much beside the weights it reads."""
        copied = self.manifest.model.num_layers * self._expanded_bytes()
        weights = weight_bytes(self.manifest, self.graphs)
        if not self.packed and copied > weights / 4:
            logger.warning(
                "the standard dialect on CUDA copies the caches of all %d rows for every head, %.2f GB in a full pass beside "
                "%.2f GB of weights; use the onnxruntime dialect (--dtype bfloat16 or float16), or lower --max-model-len",
                self.capacity,
                copied / 1e9,
                weights / 1e9,
            )

    def _arena_bytes(self) -> int:
        """What ONNX Runtime holds beside it at most, roughly: the products over the longest window of all slots.

        The standard dialect's attention also copies a layer's keys and values to all heads, and writes its scores out.
        """
        return self._rows_bytes() + self._dequantised_bytes()

    def _dequantised_bytes(self) -> int:
        """The largest matrix in blocks of each session as floats: for more than a few rows a product writes them out."""
        manifest = self.manifest
        largest = 0
        for graph in self.graphs:
            stacks = (map(manifest.quantised_weight, contract.stack_parts(name)) for name in graph.weights)
            largest += max((sum(map(manifest.table_bytes, filter(None, stack))) for stack in stacks), default=0)
        return largest

    def _rows_bytes(self) -> int:
        model, width = self.manifest.model, DTYPE_BYTES[self.manifest.model.dtype]
        rows = model.max_window * (1 if self.packed else self.slots)
        widest = 3 * model.intermediate_size + 4 * model.hidden_size + 4 * model.num_heads * model.head_dim
        if self.packed:
            return rows * widest * width
        scores = rows * model.num_heads * self.capacity * width
        return rows * widest * width + 2 * scores + self._expanded_bytes()

    def _expanded_bytes(self) -> int:
        """One layer's keys and values copied to all heads."""
        model = self.manifest.model
        return kv_bytes(model, self.slots * self.capacity, layers=1) * model.num_heads // model.num_kv_heads
