"""Scores from a bundle: its own graphs in ONNX Runtime, rows laid out and gated by the runtime's own code.

A sequence goes through thinking and late_decode in chunks; in late_decode every row is a late row, and logits are asked for
a bounded number of rows at a time. Keys and values stay between calls, one set a mode: a sequence that begins as the last
one did (a question with another answer, a text one token longer) computes only what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from dmtd_export.evaluate.scorer import Array, ScoreRequest, TokenScores, check_request
from dmtd_runtime.backends.base import PREFILL_ROUNDING, BackendOptions, RunStats, SlotStep, rounded_rows
from dmtd_runtime.backends.kv_cache import HostKvCache
from dmtd_runtime.backends.layouts.packed import PackedLayout
from dmtd_runtime.backends.layouts.rectangular import RectangularLayout
from dmtd_runtime.backends.onnxruntime.memory import Buffer, host_buffer, open_memory, small_tensors
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.cycle import CyclePlan, Step
from dmtd_runtime.errors import BackendError
from dmtd_runtime.ort.session import Binding, open_session

LOGIT_BYTES = 64 << 20  # float32 logits of one run
CUDA_MAX_LEN = 4096  # tokens of a sequence on a GPU
GRAPHS: tuple[contract.GraphName, ...] = (contract.THINKING, contract.LATE_DECODE)


class BundleScorer:
    """See :class:`dmtd_export.evaluate.scorer.Scorer`."""

    batch_hint = 1

    def __init__(
        self,
        directory: Path,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int | None = None,
        dialect: contract.Dialect | None = None,
    ) -> None:
        """Open ``directory``, made by `dmtd export`.

        Raises:
            BundleError: it is missing or damaged.
            BackendError: the library or device asked for is not usable, or does not take the bundle's type.
        """
        manifest = open_bundle(directory)
        if device == "cpu" and manifest.model.dtype == "bfloat16":
            raise BackendError(
                "this bundle is bfloat16, which ONNX Runtime cannot run on the CPU; evaluate its checkpoint, export it "
                "with --dtype float32, or use --device cuda"
            )
        self.manifest = manifest
        self.cycle = manifest.cycle
        self.vocab_size = manifest.model.vocab_size
        # A device commits its caches whole, one set a mode; the host's grow with what is written.
        self.max_len = manifest.model.max_model_len
        if device == "cuda":
            self.max_len = min(self.max_len, CUDA_MAX_LEN)
        self.options = BackendOptions(device=device, threads=threads)
        dialect = dialect or manifest.default_dialect
        self.graphs = {name: manifest.graph(name, dialect) for name in GRAPHS}
        self.memory = open_memory(self.options)
        self.sessions = {
            name: open_session(directory / graph.file, self.options, stream=self.memory.stream)
            for name, graph in self.graphs.items()
        }
        self.layout: PackedLayout | RectangularLayout = (
            PackedLayout(1) if dialect == contract.ONNXRUNTIME else RectangularLayout(1)
        )
        # Rows of a run, and of one whose logits are wanted: sizes that the layouts do not round up further.
        self.chunk = contract.MIN_WINDOW
        fitting = [rows for rows in PREFILL_ROUNDING if 4 * rows * self.vocab_size <= LOGIT_BYTES]
        self.logit_chunk = max(fitting, default=PREFILL_ROUNDING[0])
        sizes = {"batch": 1, **dict.fromkeys(("window_len", "late_len", "num_logits"), self.chunk)}
        for graph in self.graphs.values():
            self.memory.reserve(graph.name, small_tensors(graph, sizes))
        self._lanes = {plain: _Lane(self, CyclePlan(cycle=self.cycle, plain=plain)) for plain in (False, True)}

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """See the protocol."""
        for request in requests:
            check_request(request, self.max_len, self.vocab_size)
        return [self._lanes[request.plain].score(request) for request in requests]

    def close(self) -> None:
        """Free sessions and caches."""
        for lane in self._lanes.values():
            lane.close()
        self.sessions.clear()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Lane:
    """One mode's caches and what stands in them."""

    def __init__(self, owner: BundleScorer, plan: CyclePlan) -> None:
        self._owner = owner
        self._plan = plan
        self._rows: list[tuple[int, bool, bool]] = []  # (token, gate_hidden, gate_thought) of every row in the caches
        self._bindings: dict[tuple[contract.GraphName, tuple[tuple[str, int], ...]], Binding] = {}
        self._buffers: dict[tuple[str, tuple[int, ...]], Buffer] = {}
        self._stats = RunStats()
        model = owner.manifest.model
        self._capacity = owner.max_len + model.max_window
        on_host = owner.options.device == "cpu"
        # Host caches are lazy: rows that are never written take no memory.
        self._host_cache = HostKvCache(model, 1, self._capacity) if on_host else None
        self._caches: dict[tuple[int, contract.Kind], Buffer] = {}

    def score(self, request: ScoreRequest) -> TokenScores:
        """Run the rows that are not in the caches yet, and score those asked for."""
        ids, n = request.token_ids, len(request.token_ids)
        wanted = [(i, *self._plan.gates(p, request.prompt_len)) for p, i in enumerate(ids)]
        pairs = enumerate(zip(wanted, self._rows, strict=False))
        shared = next((i for i, (new, old) in pairs if new != old), min(n, len(self._rows)))
        start = min(shared, request.first_row)
        self._rows = wanted[:start]
        logprobs, top1 = [], []
        while start < n:
            unscored = start < request.first_row
            most = self._owner.chunk if unscored else self._owner.logit_chunk
            window = range(start, min(request.first_row if unscored else n, start + most))
            targets = [] if unscored else [*ids, 0][start + 1 : window.stop + 1]
            chosen, best = self._run(wanted, window, targets)
            logprobs.append(chosen)
            top1.append(best)
            self._rows = wanted[: window.stop]
            start = window.stop
        return TokenScores(target_logprobs=np.concatenate(logprobs)[:-1], top1=np.concatenate(top1))

    def close(self) -> None:
        """Let go of bindings and caches."""
        self._bindings.clear()
        self._buffers.clear()
        self._caches.clear()
        if self._host_cache is not None:
            self._host_cache.close()

    def _run(
        self, rows: Sequence[tuple[int, bool, bool]], window: range, targets: Sequence[int]
    ) -> tuple[Array, Array]:
        """Feed the rows of ``window``; returns their target log-probabilities float64 and likeliest tokens int64."""
        step = Step(
            kind="prefill",
            window=window,
            late=window,
            gate_hidden=tuple(rows[i][1] for i in window),
            gate_thought=tuple(rows[i][2] for i in window),
            wants_logits=True,
        )
        steps = [SlotStep(slot=0, step=step, ids=[rows[i][0] for i in window])]
        num_logits = len(window) if targets else 1
        for name in GRAPHS:
            layout = self._owner.layout
            sizes = dict(layout.sizes(name, steps))
            if name == contract.LATE_DECODE:
                sizes["num_logits"] = rounded_rows(num_logits) if num_logits > 1 else 1
            binding = self._binding(name, sizes)
            binding.begin()
            layout.fill(name, binding.arrays, steps, [window.start])
            if name == contract.LATE_DECODE:
                at = np.minimum(np.arange(sizes["num_logits"]), len(window) - 1)
                binding.arrays[contract.LOGIT_ROWS].reshape(-1)[:] = at
            binding.run(self._stats)
        if not targets:
            self._owner.memory.wait()
            return np.zeros(0), np.zeros(0, np.int64)
        buffer = self._output(contract.LATE_DECODE, contract.LOGITS, sizes)
        logits = self._owner.memory.read(buffer).reshape(-1, self._owner.vocab_size)
        return score_logits(logits[:num_logits], targets)

    def _binding(self, name: contract.GraphName, sizes: dict[str, int]) -> Binding:
        key = (name, tuple(sizes.items()))
        if key not in self._bindings:
            graph = self._owner.graphs[name]
            buffers: dict[str, Buffer] = {}
            for info in (*graph.inputs, *graph.outputs):
                if cache := contract.cache_name(info.name):
                    buffers[info.name] = self._cache(cache.layer, cache.kind)
                elif info.name in (contract.THOUGHT, contract.LOGITS):
                    buffers[info.name] = self._output(name, info.name, sizes)
            all_sizes = {**sizes, "capacity": self._capacity}
            session = self._owner.sessions[name]
            self._bindings[key] = Binding(session, graph, all_sizes, buffers, self._owner.memory)
        return self._bindings[key]

    def _cache(self, layer: int, kind: contract.Kind) -> Buffer:
        if (layer, kind) not in self._caches:
            if self._host_cache is not None:
                self._caches[layer, kind] = host_buffer(self._host_cache.buffer(layer, kind))
            else:
                model = self._owner.manifest.model
                shape = (1, model.num_kv_heads, self._capacity, model.head_dim)
                self._caches[layer, kind] = self._owner.memory.zeros(shape, model.dtype, f"the cache of layer {layer}")
        return self._caches[layer, kind]

    def _output(self, graph: contract.GraphName, output: str, sizes: dict[str, int]) -> Buffer:
        """The buffer of thought or logits of this shape; thought is one for both graphs."""
        infos = (*self._owner.graphs[graph].outputs, *self._owner.graphs[graph].inputs)
        info = next(i for i in infos if i.name == output)
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in info.dims)
        if (output, shape) not in self._buffers:
            self._buffers[output, shape] = self._owner.memory.zeros(shape, info.dtype, output)
        return self._buffers[output, shape]


def score_logits(logits: Array, targets: Sequence[int]) -> tuple[Array, Array]:
    """Log-probability of each row's target, float64 [rows], and each row's arg-max, int64 [rows]."""
    largest = logits.max(-1, keepdims=True)
    total = np.exp(logits - largest).sum(-1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), np.asarray(targets)].astype(np.float64)
    return chosen - largest[:, 0].astype(np.float64) - np.log(total), logits.argmax(-1).astype(np.int64)
