"""A serving load as data: which prompts come, how many tokens each wants, and when. Runs nothing.

Lengths and token ids are drawn from a seed, or taken from a file (``dataset.py``). Arrivals are a Poisson process, or all at
once; in a closed loop there are none, because a sequence comes whenever another one has ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmtd_runtime.errors import RequestError

PROMPTS_PER_SLOT = 4  # where nobody says how many


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What arrives, and when.

    ``request_rates`` are sequences a second, each a load of its own; infinity: all at once. ``concurrency``: a closed loop of so
    many instead. Lengths are uniform within ``range_ratio`` of what was asked for on either side, behind ``prefix_len`` tokens
    that all prompts share. ``dataset``: prompts and lengths of a file instead. ``num_prompts`` None: four for each slot, or all
    of the file. ``long_prompts`` come besides, of ``long_prompt_len`` tokens and one new token each, to be read one after another
    in the last slot while the others decode.
    """

    request_rates: tuple[float, ...] = (math.inf,)
    concurrency: int | None = None
    num_prompts: int | None = None
    range_ratio: float = 0.5
    prefix_len: int = 0
    dataset: Path | None = None
    long_prompts: int = 0
    long_prompt_len: int = 4000

    def __post_init__(self) -> None:
        if not self.request_rates or not all(rate > 0 for rate in self.request_rates):
            raise RequestError(
                f"got {list(self.request_rates)}, expected sequences a second above 0, or inf", param="request_rates"
            )
        if self.concurrency is not None and self.request_rates != (math.inf,):
            raise RequestError(
                f"got {self.concurrency} with a request rate, expected one of the two: a closed loop has no rate",
                param="concurrency",
            )
        for name in ("concurrency", "num_prompts", "prefix_len", "long_prompts", "long_prompt_len"):
            value, least = getattr(self, name), 0 if name in ("prefix_len", "long_prompts") else 1
            if value is not None and value < least:
                raise RequestError(f"got {value}, expected at least {least}", param=name)
        if not 0 <= self.range_ratio < 1:
            raise RequestError(f"got {self.range_ratio:g}, expected at least 0 and below 1", param="range_ratio")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """One sequence of a load: it gets exactly ``max_tokens`` new tokens."""

    prompt_ids: tuple[int, ...]
    max_tokens: int

    @property
    def total_len(self) -> int:
        return len(self.prompt_ids) + self.max_tokens


def length_range(length: int, ratio: float) -> tuple[int, int]:
    """The shortest and the longest around ``length``, both of them drawn."""
    return max(1, math.ceil(length * (1 - ratio))), max(1, math.floor(length * (1 + ratio)))


def draw_requests(
    options: LoadOptions, count: int, *, prompt_len: int, max_tokens: int, vocab_size: int, seed: int
) -> tuple[LoadRequest, ...]:
    """Random requests: first all prompt lengths are drawn, then all output lengths, then the shared prefix and each prompt."""
    generator = np.random.default_rng(seed)
    prompts, outputs = (
        generator.integers(*length_range(length, options.range_ratio), endpoint=True, size=count).tolist()
        for length in (prompt_len, max_tokens)
    )
    prefix = generator.integers(0, vocab_size, options.prefix_len).tolist()
    return tuple(
        LoadRequest(prompt_ids=(*prefix, *generator.integers(0, vocab_size, own).tolist()), max_tokens=wanted)
        for own, wanted in zip(prompts, outputs, strict=True)
    )


def with_long_prompts(
    requests: Sequence[LoadRequest], options: LoadOptions, slots: int, *, vocab_size: int, seed: int
) -> tuple[LoadRequest, ...]:
    """The requests, and behind those that take all slots but one the long prompts, each of its own tokens."""
    generator = np.random.default_rng([seed, options.long_prompt_len])
    drawn = generator.integers(0, vocab_size, (options.long_prompts, options.long_prompt_len)).tolist()
    longs = [LoadRequest(prompt_ids=tuple(ids), max_tokens=1) for ids in drawn]
    return (*requests[: slots - 1], *longs, *requests[slots - 1 :])


def arrival_times(rate: float, count: int, seed: int) -> tuple[float, ...]:
    """Seconds after the start at which each comes, the first one at once: gaps are exponential, with mean 1 / ``rate``."""
    if math.isinf(rate):
        return (0.0,) * count
    gaps = np.random.default_rng(seed).exponential(1 / rate, count - 1)
    return (0.0, *np.cumsum(gaps).tolist())
