"""What a worker is doing and has done, as plain numbers: written by its thread after every step, read by anybody."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Ends of the buckets of ``Counts.step_tokens``; the last bucket has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A moment of a worker. Gauges first, then counts since it was opened.

    Sequences, not requests, are counted. ``kv_rows`` of ``kv_capacity_rows`` rows of the slots are committed. A cycle is in
    phase if every running sequence stood at its head; ``dropped_tokens`` are choices of late steps that were not kept;
    ``prefix_queries`` and ``prefix_hits`` are prompt tokens. ``step_tokens`` are steps by the tokens that went
    through them, of prompts and one for each sequence that decodes.
    """

    running: int = 0
    waiting: int = 0
    waiting_prompt_tokens: int = 0
    kv_rows: int = 0
    kv_capacity_rows: int = 0
    prefix_cache_bytes: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    full_passes: int = 0
    prefill_passes: int = 0
    late_steps: int = 0
    refill_rows: int = 0
    dropped_tokens: int = 0
    head_passes: int = 0
    head_passes_in_phase: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    step_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKENS) + 1)
    step_tokens_sum: int = 0


class StepTokens:
    """Steps by the tokens that went through them."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(STEP_TOKENS) + 1), 0

    def add(self, tokens: int, steps: int = 1) -> None:
        """Take so many steps of so many tokens each."""
        self.counts[bisect_left(STEP_TOKENS, tokens)] += steps
        self.sum += tokens * steps
