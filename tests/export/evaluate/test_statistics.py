"""Known answers: closed forms, and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dmtd_export.evaluate.statistics import Bootstrap, Estimate, PairedScores, Retention, interval, retention


def scores(name: str, model: int, base: int, n: int, chance: float = 0.0) -> PairedScores:
    """``model`` and ``base`` right answers of ``n``; both begin at the same item."""
    rows = np.arange(n)
    return PairedScores(
        name=name,
        model=(rows < model).astype(float),
        base=(rows < base).astype(float),
        chance=np.full(n, chance),
    )


def test_mean_of_coin_tosses_has_the_binomial_interval() -> None:
    tosses = (np.arange(400) % 2).astype(float)[:, None]
    found = Bootstrap(resamples=4000, seed=1).estimate(tosses, lambda s: s[..., 0] / 400)
    half = 1.96 * math.sqrt(0.25 / 400)  # 0.049
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - half, abs=0.004)
    assert found.high == pytest.approx(0.5 + half, abs=0.004)


def test_pairing_takes_the_common_part_away() -> None:
    """Both sides vary tenfold between items, their ratio does not: drawn together, it is 0.8 in every replicate."""
    base = np.linspace(1, 10, 30)
    found = Bootstrap(resamples=500).estimate(np.stack([0.8 * base, base], -1), lambda s: s[..., 0] / s[..., 1])
    assert (found.low, found.value, found.high) == pytest.approx((0.8, 0.8, 0.8), abs=1e-12)


def test_the_same_seed_gives_the_same_interval() -> None:
    units = np.random.default_rng(0).random((20, 1))

    def bounds(seed: int) -> list[float] | None:
        return Bootstrap(resamples=200, seed=seed).estimate(units, lambda s: s[..., 0] / 20).interval()

    assert bounds(3) == bounds(3)
    assert bounds(3) != bounds(4)


def test_one_unit_has_no_interval() -> None:
    found = Bootstrap().estimate(np.array([[2.0, 4.0]]), lambda s: s[..., 0] / s[..., 1])
    assert found.value == 0.5
    assert found.interval() is None


def test_percentiles() -> None:
    found = interval(50.0, np.arange(101.0))
    assert (found.low, found.high, found.width) == (2.5, 97.5, 95.0)


def test_undefined_replicates_are_left_out_unless_they_are_most() -> None:
    assert interval(1.0, np.array([1.0, 1.0, 1.0, np.nan])).interval() == [1.0, 1.0]
    assert interval(1.0, np.array([1.0, np.inf, np.nan, np.nan])).interval() is None


@pytest.mark.parametrize(
    ("right", "expected"),
    # chance 0.25, n 100: 35 right exceed it by 0.10, the standard error is sqrt(0.35 * 0.65 / 99) = 0.0479; 34 right
    # exceed it by 0.09 with one of 0.0476.
    [(35, True), (34, False), (25, False), (10, False), (100, True)],
)
def test_above_chance_by_two_standard_errors(right: int, expected: bool) -> None:
    assert scores("task", 0, right, 100, chance=0.25).above_chance is expected


def test_one_item_is_never_above_chance() -> None:
    assert not scores("task", 1, 1, 1).above_chance


def test_solved_counts_the_items_of_the_base() -> None:
    given = {"model": [1, 1, 0, 0.5, 1], "base": [1, 0, 1, 1, 0.5]}
    paired = PairedScores(name="a", chance=np.zeros(5), **{name: np.array(value) for name, value in given.items()})
    assert paired.solved == (3, 1)


def test_retention_is_the_mean_of_ratios_over_tasks_above_chance() -> None:
    tasks = [
        scores("a", 180, 200, 400, chance=0.25),  # 0.9; chance-corrected (0.45 - 0.25) / (0.5 - 0.25) = 0.8
        scores("b", 210, 300, 400),  # 0.7 both ways
        scores("c", 400, 100, 400, chance=0.25),  # the base guesses
    ]
    found = retention(tasks, Bootstrap(resamples=300))
    assert found.tasks == ("a", "b")
    assert found.left_out == ("c",)
    assert found.plain is not None
    assert found.chance_corrected is not None
    assert found.plain.value == pytest.approx(0.8)
    assert found.chance_corrected.value == pytest.approx(0.75)
    # a: model's items are among the base's, so the ratio's variance is that of a share of 200; b: of 300.
    error = 0.5 * math.sqrt(0.9 * 0.1 / 200 + 0.7 * 0.3 / 300)
    assert found.plain.width == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found.wide


def test_a_narrow_retention_is_not_wide() -> None:
    found = retention([scores("a", 990, 1000, 1000)], Bootstrap(resamples=300))
    assert found.plain is not None
    assert found.plain.value == pytest.approx(0.99)
    assert not found.wide


def test_nothing_above_chance_has_no_retention() -> None:
    found = retention([scores("a", 10, 10, 40, chance=0.25)], Bootstrap())
    assert (found.plain, found.chance_corrected, found.left_out) == (None, None, ("a",))
    assert not found.wide


def test_an_unknown_interval_counts_as_wide() -> None:
    unknown = Retention(tasks=("a",), left_out=(), plain=Estimate(value=1.0), chance_corrected=None)
    assert unknown.wide


def test_few_units_have_no_interval() -> None:
    """Of four, 35 different replicates can be drawn."""
    units = np.array([[1.0], [2.0], [4.0], [7.0], [8.0]])
    whole, few = (Bootstrap().estimate(units[:n], lambda s: s[..., 0]) for n in (5, 4))
    assert few.interval() is None and few.value == 14.0
    assert whole.interval() is not None


def test_few_items_that_are_all_alike_say_nothing_of_the_spread() -> None:
    few, many = scores("few", 59, 59, 59), scores("many", 60, 60, 60)
    assert retention([few], Bootstrap(resamples=200)).wide
    assert retention([few, many], Bootstrap(resamples=200)).wide
    found = retention([many], Bootstrap(resamples=200))
    assert found.plain == Estimate(value=1.0, low=1.0, high=1.0)
    assert Bootstrap().estimate(few.table, lambda s: s[..., 0]).interval() is None
