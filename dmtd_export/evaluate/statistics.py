"""Estimates with 95% intervals by the paired bootstrap over items. Numbers in, numbers out: no model, no text.

Everything measured is a function of sums over independent units (documents, prefixes, questions). A replicate draws as many
units as there are, with replacement, and the model's and the base's scores of a unit are drawn together: that is the pairing.
Intervals are the 2.5 and 97.5 percentiles of the replicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Statistic = Callable[[Array], Array]

CHANCE_ERRORS = 2.0  # standard errors that the base must stand above chance
WIDE = 0.05  # a retention whose interval is wider than this is reported as wide
MIN_UNITS = 5  # fewer leave too few different replicates to take percentiles of
# Units that are all alike resample to themselves. Three over their count is what they leave open (the rule of three): below
# this many, no interval is better than one of no width.
MIN_ALIKE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value and its 95% interval; NaN bounds where there are too few units to say."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def width(self) -> float:
        """Length of the interval."""
        return self.high - self.low

    def interval(self) -> list[float] | None:
        """[low, high] for JSON, None where unknown."""
        return None if math.isnan(self.low) or math.isnan(self.high) else [self.low, self.high]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How to resample."""

    resamples: int = 1000
    seed: int = 0

    def sums(self, units: Array) -> Array:
        """Sums of ``units`` [n, ...] over each replicate's draw, float64 [resamples, ...]."""
        n = len(units)
        counts = np.random.default_rng(self.seed).multinomial(n, np.full(n, 1 / n), size=self.resamples)
        return np.tensordot(counts.astype(np.float64), units.astype(np.float64), axes=1)

    def estimate(self, units: Array, statistic: Statistic) -> Estimate:
        """``statistic`` of the sums of ``units`` [n, ...]; it maps [..., *unit shape] to [...] (one number a replicate)."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value = float(statistic(units.astype(np.float64).sum(0)))
            if len(units) < MIN_UNITS or _too_few_alike(units):
                return Estimate(value=value)
            return interval(value, statistic(self.sums(units)))


def _too_few_alike(units: Array) -> bool:
    return len(units) < MIN_ALIKE and bool((units == units[0]).all())


def interval(value: float, replicates: Array) -> Estimate:
    """The estimate whose replicates these are; those that are undefined are left out."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) < len(replicates) / 2:
        return Estimate(value=value)
    low, high = np.percentile(finite, [2.5, 97.5])
    return Estimate(value=value, low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedScores:
    """One task: scores 0..1 of the same items, and what a guess would score on each. Arrays of float64 [n]."""

    name: str
    model: Array
    base: Array
    chance: Array

    def __post_init__(self) -> None:
        assert self.model.shape == self.base.shape == self.chance.shape, f"{self.name}: scores are not paired"

    @property
    def above_chance(self) -> bool:
        """Whether the base's mean exceeds chance by CHANCE_ERRORS standard errors."""
        n = len(self.base)
        if n < 2:
            return False
        excess = self.base - self.chance
        error = float(excess.std(ddof=1)) / math.sqrt(n)
        return bool(float(excess.mean()) > CHANCE_ERRORS * error and excess.mean() > 0)

    @property
    def solved(self) -> tuple[int, int]:
        """How many items the base solves (score 1: in every wording), and in how many of these the model scores over a half."""
        known = self.base == 1
        return int(known.sum()), int((self.model[known] > 0.5).sum())

    @property
    def table(self) -> Array:
        """float64 [n, 3]: model, base, chance."""
        return np.stack([self.model, self.base, self.chance], axis=-1).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept of the base's scores, mean over ``tasks``; the others are not counted, for the base only guesses there."""

    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    plain: Estimate | None  # mean of score / base score
    chance_corrected: Estimate | None  # mean of (score - chance) / (base score - chance)

    @property
    def wide(self) -> bool:
        """Whether the interval is wider than 5 points, or unknown: too few items to speak of a retention."""
        return self.plain is not None and not self.plain.width <= WIDE


def retained(sums: Array) -> Array:
    """Score over base score, of sums [..., 3]."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def retained_above_chance(sums: Array) -> Array:
    """The same after chance is taken from both, of sums [..., 3]."""
    return np.asarray((sums[..., 0] - sums[..., 2]) / (sums[..., 1] - sums[..., 2]))


def retention(tasks: Sequence[PairedScores], bootstrap: Bootstrap) -> Retention:
    """Mean over the tasks on which the base is above chance; items are drawn within each task."""
    counted = [task for task in tasks if task.above_chance]
    left_out = tuple(task.name for task in tasks if not task.above_chance)
    if not counted:
        return Retention(tasks=(), left_out=left_out, plain=None, chance_corrected=None)
    replicates = [
        # Another seed for every task: tasks are independent.
        Bootstrap(resamples=bootstrap.resamples, seed=bootstrap.seed + 1 + i).sums(task.table)
        for i, task in enumerate(counted)
    ]
    unknown = any(_too_few_alike(task.table) for task in counted)
    found = []
    for statistic in (retained, retained_above_chance):
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(np.mean([statistic(task.table.sum(0)) for task in counted]))
            drawn = np.mean([statistic(sums) for sums in replicates], axis=0)
        found.append(Estimate(value=value) if unknown else interval(value, drawn))
    return Retention(
        tasks=tuple(task.name for task in counted), left_out=left_out, plain=found[0], chance_corrected=found[1]
    )
