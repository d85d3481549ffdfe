"""Logits of known tokens, one sequence's among others and its prompt cut into chunks: what company and cuts may change."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmtd_export.verify.forced import forced_logits
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.cycle import CyclePlan

ALONE = (1, 64)
COMPANY_AND_CUTS = ((1, 1), (1, 3), (1, 8), (1, 23), (3, 64), (3, 5))  # (sequences, rows of a chunk)
NEW = 7


def first_logits(directory: Path, manifest: Manifest, count: int, chunk: int, *, plain: bool) -> np.ndarray:
    """Those of the first of ``count`` sequences, a prompt of 64 read in chunks of so many rows and 7 tokens behind it."""
    rng, vocab = np.random.default_rng(0), manifest.model.vocab_size
    prompts = [rng.integers(0, vocab, length).tolist() for length in (64, 5, 23)]
    tokens = [rng.integers(0, vocab, NEW).tolist() for _ in prompts]
    backend = open_backend(directory, manifest, BackendOptions(max_num_seqs=count, max_model_len=128, threads=1))
    try:
        plan = CyclePlan(cycle=manifest.cycle, plain=plain)
        given = prompts[:count], tokens[:count], [NEW] * count
        return forced_logits(backend, plan, *given, vocab_size=vocab, max_rows=chunk)[0]
    finally:
        backend.close()
