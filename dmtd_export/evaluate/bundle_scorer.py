"""Scores from a bundle: its own graphs through the runtime's backend, rows gated by the runtime's own code.

A sequence goes through in chunks, as prompts do, every row of it a late row; logits are asked for a bounded number of rows at
a time. Cached activations stay between calls: a sequence that begins as the last one did, token by token and gate by gate (a
question with another answer, a text one token longer), computes only what differs. What stands in E's and T's caches depends
on the tokens alone, so both modes share one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from dmtd_export.evaluate.scorer import Array, ScoreRequest, TokenScores, check_request
from dmtd_runtime.backends.base import PREFILL_ROUNDING, BackendOptions, SlotStep
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.cycle import CyclePlan, Step
from dmtd_runtime.errors import BackendError

LOGIT_BYTES = 64 << 20  # float32 logits of one run


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
                f"{directory}: this bundle is bfloat16, which ONNX Runtime cannot run on the CPU; evaluate its checkpoint, "
                "export it with --dtype float32, or use --device cuda"
            )
        self.manifest = manifest
        self.cycle = manifest.cycle
        self.vocab_size = manifest.model.vocab_size
        # Staged: thinking's and late_decode's weights once, and the dialect's own graphs of one slot.
        options = BackendOptions(device=device, threads=threads, dialect=dialect, full_pass="staged")
        self._backend = open_backend(directory, manifest, options)
        self.max_len = self._backend.max_model_len
        # Rows of a run, and of one whose logits are wanted: sizes that the layouts do not round up further.
        self.chunk = contract.MIN_WINDOW
        fitting = [rows for rows in PREFILL_ROUNDING if 4 * rows * self.vocab_size <= LOGIT_BYTES]
        self.logit_chunk = max(fitting, default=PREFILL_ROUNDING[0])
        self._plans = {plain: CyclePlan(cycle=self.cycle, plain=plain) for plain in (False, True)}
        self._rows: list[tuple[int, bool, bool]] = []  # (token, gate_hidden, gate_thought) of every row in the caches

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """See the protocol."""
        for request in requests:
            check_request(request, self.max_len, self.vocab_size)
        return [self._score(request) for request in requests]

    def close(self) -> None:
        """Free sessions and caches."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score(self, request: ScoreRequest) -> TokenScores:
        """Run the rows that are not in the caches yet, and score those asked for."""
        ids, n, plan = request.token_ids, len(request.token_ids), self._plans[request.plain]
        wanted = [(i, *plan.gates(p, request.prompt_len)) for p, i in enumerate(ids)]
        pairs = enumerate(zip(wanted, self._rows, strict=False))
        shared = next((i for i, (new, old) in pairs if new != old), min(n, len(self._rows)))
        start = min(shared, request.first_row)
        logprobs, top1 = [], []
        while start < n:
            self._rows = wanted[:start]
            unscored = start < request.first_row
            most = self.chunk if unscored else self.logit_chunk
            window = range(start, min(request.first_row if unscored else n, start + most))
            targets = [] if unscored else [*ids, 0][start + 1 : window.stop + 1]
            chosen, best = self._run(wanted, window, targets)
            logprobs.append(chosen)
            top1.append(best)
            start = window.stop
        self._rows = wanted
        return TokenScores(target_logprobs=np.concatenate(logprobs)[:-1], top1=np.concatenate(top1))

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
            wants_logits=bool(targets),
        )
        steps = [SlotStep(slot=0, step=step, ids=[rows[i][0] for i in window])]
        output = self._backend.run(steps, [window.start], rows="all" if targets else "last")
        if not targets:
            return np.zeros(0), np.zeros(0, np.int64)
        assert output.logits is not None, "nothing was to be chosen"
        return score_logits(output.logits, targets)


def score_logits(logits: Array, targets: Sequence[int]) -> tuple[Array, Array]:
    """Log-probability of each row's target, float64 [rows], and each row's arg-max, int64 [rows]."""
    largest = logits.max(-1, keepdims=True)
    total = np.exp(logits - largest).sum(-1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), np.asarray(targets)].astype(np.float64)
    return chosen - largest[:, 0].astype(np.float64) - np.log(total), logits.argmax(-1).astype(np.int64)
