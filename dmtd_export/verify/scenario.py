"""What every graph is run over when it is checked by itself: token ids, gates, and calls that use windows and pasts.

Two sequences of different lengths. The gates are drawn at random for every row, so that both are exercised in every
combination wherever they stand. The last call of the first sequence has a refill's shape: a window of several rows
through T, of which only the last one enters D. Knows ranges and integers only; ``feeds.py`` makes inputs of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One run of a graph: for each sequence T's rows and D's rows (the tail of T's)."""

    windows: tuple[range, ...]
    lates: tuple[range, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """``ids`` int64 [sequences, n], ``gate_*`` bool [sequences, n]; rows from ``lengths`` on are padding."""

    ids: Array
    lengths: tuple[int, ...]
    gate_hidden: Array
    gate_thought: Array
    calls: tuple[Call, ...]

    @property
    def capacity(self) -> int:
        """KV rows that leave room for padding."""
        return 2 * int(self.ids.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the rows of a scenario compute; arrays a graph does not produce are empty or missing.

    ``thought`` [sequences, n, hidden], ``logits`` [sequences, n, vocab], ``caches[layer, kind]`` [sequences,
    kv_heads, n, head_dim]. ``codes``: of int8 caches what stands in them, of which ``caches`` are the values.
    """

    thought: Array | None
    logits: Array | None
    caches: dict[tuple[int, str], Array]
    codes: dict[tuple[int, str], Array] = field(default_factory=dict)


def make_scenario(vocab_size: int, seed: int = 0) -> Scenario:
    """The scenario for a vocabulary; the same seed gives the same one."""
    rng = np.random.default_rng(seed)
    lengths = (13, 9)
    shape = (len(lengths), max(lengths))
    pairs = np.array([(True, True), (True, False), (False, True)])[rng.integers(0, 3, shape)]
    pairs[:, :3] = [(True, True), (True, False), (False, True)]
    pairs[:, [length - 1 for length in lengths]] = True, True
    return Scenario(
        ids=rng.integers(0, vocab_size, shape),
        lengths=lengths,
        gate_hidden=pairs[..., 0],
        gate_thought=pairs[..., 1],
        calls=(
            Call(windows=(range(6), range(3)), lates=(range(6), range(3))),
            Call(windows=(range(6, 12), range(3, 8)), lates=(range(6, 12), range(3, 8))),
            Call(windows=(range(9, 13), range(8, 9)), lates=(range(12, 13), range(8, 9))),
        ),
    )
