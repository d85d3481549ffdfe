"""Repetition in token ids: shares known by hand, and loops in which numbers count up."""

import pytest

from dmtd_models.data.repetition import distinct_share, is_loop, number_ids


def test_distinct_share():
    assert distinct_share([1, 2, 3]) == 1.0
    assert distinct_share([1, 2, 3, 4, 5]) == 1.0
    assert distinct_share([7] * 13) == 0.1
    assert distinct_share([1, 2] * 6) == pytest.approx(2 / 9)
    assert distinct_share([7] * 12, 3) == pytest.approx(1 / 10)
    assert distinct_share([1, 2], 3) == 1.0


def test_numbers_of_a_vocabulary():
    assert number_ids({"1": 0, "\u012023": 1, "a1": 2, "\u25817": 3, "": 4}) == {0, 1, 3}


def test_a_loop_may_count_up():
    numbers = frozenset(range(100))
    counting = [part for n in range(30) for part in (n, 200, 201, 202, 203)]
    assert distinct_share(counting) > 0.5
    assert is_loop(counting, numbers)
    assert not is_loop(counting[:90], numbers), "too short to tell"
    assert not is_loop(list(range(300, 420)), numbers)
    assert is_loop([*range(300, 420), *[1, 2] * 60], frozenset()), "the end of a good answer"
