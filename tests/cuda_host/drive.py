"""Runs one case over the stand-ins, in a process of its own: python -m cuda_host.drive BUNDLE CASE, the trace where
STAND_IN_TRACE says.

Marks in the trace, JSON objects, tell what the calls between them are for: a bundle opened and closed, a phase (how tokens are
chosen; warming up or not), a step of the backend, a graph that a session runs.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cuda
from cuda_host.cases import CASES, MAX_TOKENS, WARM_UPS, Case

import dmtd_runtime.serving.service
from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.backends.base import RunOutput, SlotStep

CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "seed": 1},
    "logprobs": {"temperature": 0.8, "seed": 1, "logprobs": 2},
}


def mark(mark_kind: str, /, **facts: object) -> None:
    cuda.stand_in_mark(json.dumps({"mark": mark_kind, **facts}))


class MarkedBackend:
    """A backend whose steps are marked, and whose tokens are 0 whatever the stand-ins left in their place."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, steps: Sequence[SlotStep], committed: Sequence[int], **options: Any) -> RunOutput:
        tokens = sum(s.step.wants_logits for s in steps)
        prompts = sum(s.step.kind == "prefill" for s in steps)
        mark("step", kind=steps[0].step.kind, sequences=len(steps), prompts=prompts, tokens=tokens)
        output = self._backend.run(steps, committed, **options)
        mark("between")
        zeros = {
            name: np.zeros_like(found) for name in ("logits", "tokens") if (found := getattr(output, name)) is not None
        }
        return RunOutput(**zeros)


def mark_graphs() -> None:
    """Let every session say which graph it runs."""
    run = onnxruntime.InferenceSession.run_with_iobinding

    def run_marked(session: Any, *args: Any, **options: Any) -> None:
        mark("graph", file=Path(session._model_path).name)
        run(session, *args, **options)

    onnxruntime.InferenceSession.run_with_iobinding = run_marked


def drive(bundle: Path, case: Case, *, cuda_graphs: bool, plain: bool) -> None:
    """Open the bundle, warm it up, and measure every way of choosing tokens."""
    gc.collect()  # what failed before lets go of its memory
    mark("open", cuda_graphs=cuda_graphs, plain=plain)
    # Prefixes that are kept are copied to the host and waited for, which is no part of a step.
    with LLM(bundle, cuda_graphs=cuda_graphs, plain=plain, prefix_cache_bytes=0, **case.llm_options()) as llm:
        backend, model = llm._worker._backend, llm.manifest.model
        row_bytes = model.num_kv_heads * model.head_dim * (4 if model.dtype == "float32" else 2)
        kv_bytes = 2 * model.num_layers * backend.slots * backend.capacity * row_bytes
        weight_bytes = sum(path.stat().st_size for path in bundle.glob("*.data"))
        # The standard dialect's attention copies a layer's keys and values to all heads, in the arena of each of two sessions,
        # and writes the scores of a window out.
        copied_bytes = 0
        if case.dialect == "standard":
            expanded = kv_bytes // model.num_layers * model.num_heads // model.num_kv_heads
            width = row_bytes // (model.num_kv_heads * model.head_dim)
            copied_bytes = 2 * expanded + backend.slots * model.num_heads * model.max_window * backend.capacity * width
        elif llm.manifest.quantised:
            # For more than a few rows a product writes its weights out, in the arena of each of two sessions.
            copied_bytes = 2 * 2 * model.hidden_size * max(model.vocab_size, 2 * model.intermediate_size)
        mark("needs", kv_bytes=kv_bytes, weight_bytes=weight_bytes, copied_bytes=copied_bytes)
        prompts = [[1 + position % 100 for position in range(length)] for length in case.prompt_lens]
        for choice, options in CHOICES.items():
            params = [SamplingParams(max_tokens=n, ignore_eos=True, **options) for n in MAX_TOKENS[: len(prompts)]]
            if (choice != "greedy" and plain) or (choice == "logprobs" and cuda_graphs):
                continue  # chosen as elsewhere: once is enough
            # Shapes are those of greedy, which comes first: what is left to warm is the choice.
            for round_number in range((rounds := WARM_UPS if choice == "greedy" else 1) + 1):
                mark("phase", choice=choice, warm=round_number == rounds)
                llm.generate(prompts, params)
        mark("phase", choice="closing", warm=False)
    mark("close")


def main() -> int:
    bundle, [case] = Path(sys.argv[1]), [case for case in CASES if case.name == sys.argv[2]]
    mark_graphs()
    open_backend = dmtd_runtime.serving.service.open_backend
    dmtd_runtime.serving.service.open_backend = lambda *args, **options: MarkedBackend(open_backend(*args, **options))
    for cuda_graphs, plain in case.modes:
        try:
            drive(bundle, case, cuda_graphs=cuda_graphs, plain=plain)
        except Exception as error:
            mark("failed", error=f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
