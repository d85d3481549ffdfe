"""What generation over engines can meet, as sizes: all of it is run once before the first sequence, so that none is stalled.

A library may compile kernels at the first run of every new context, and a cycle is captured at its second. So for every batch
bucket, and every length bucket that a sequence of the longest length can reach:

| run | rows | contexts |
|---|---|---|
| prompt | each size that chunks are padded to | thinking and late_decode, or full_pass |
| single full step, for logits or towards a common head | 1 to tau in T, one in D | the same |
| single late step | 1 | late_decode |
| arg-max behind single steps | 1 | choose_token |
| cycle, of DMTD and of plain mode, by arg-max and sampled | tau or 1, then 1 | its own, and its captured graph |

That is finite, whatever prompts and options of sampling there are.

Sizes only; ``backend.py`` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dmtd_runtime.backends.base import PREFILL_ROUNDING
from dmtd_runtime.backends.engines.device_cycle import CycleShape
from dmtd_runtime.bundle import contract
from dmtd_runtime.cycle import StepKind


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """One single step: ``window_len`` rows in T (0 in a late step), the last ``late_len`` of them in D."""

    kind: StepKind
    batch: int
    window_len: int
    late_len: int
    visible_len: int

    def sizes(self, graph: contract.GraphName) -> dict[str, int]:
        """As ``RectangularLayout.sizes`` of such a step."""
        sizes = {"batch": self.batch, "late_len": self.late_len}
        if graph != contract.LATE_DECODE:
            sizes["window_len"] = self.window_len
        if graph != contract.THINKING:
            sizes["num_logits"] = 1
        return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What bounds the sizes."""

    batches: Sequence[int]
    lengths: Sequence[int]  # buckets of visible_len
    max_rows: int  # of a prompt's chunk
    cycle_length: int

    def steps(self) -> Iterator[StepSizes]:
        """Every single step."""
        chunks = sorted({min(size, self.max_rows) for size in PREFILL_ROUNDING})
        for batch in self.batches:
            for visible_len in self.lengths:
                sizes: list[tuple[StepKind, int, int]] = [("prefill", rows, rows) for rows in chunks]
                sizes += [("full", rows, 1) for rows in range(1, self.cycle_length + 1)]
                sizes.append(("late", 0, 1))
                for kind, window_len, late_len in sizes:
                    if max(window_len, late_len) <= visible_len:
                        yield StepSizes(
                            kind=kind,
                            batch=batch,
                            window_len=window_len,
                            late_len=late_len,
                            visible_len=visible_len,
                        )

    def cycles(self) -> Iterator[CycleShape]:
        """Every cycle. With a cycle length of 1 DMTD's is the plain one."""
        tau = self.cycle_length
        modes = {(True, *(False,) * (tau - 1)): tau, (True,) * tau: 1}  # full steps -> rows of the first window
        for batch in self.batches:
            for visible_len in self.lengths:
                for full, window_len in modes.items():
                    for sampled in (False, True):
                        yield CycleShape(
                            batch=batch, visible_len=visible_len, full=full, window_len=window_len, sampled=sampled
                        )
