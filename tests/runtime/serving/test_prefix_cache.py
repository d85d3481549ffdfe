"""The prefix cache by itself: what is found, what goes first, and that a full memory is no failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmtd_runtime.serving.prefix_cache import BLOCK_ROWS, Array, PrefixCache

ROW_BYTES = 2 * 4 * 4


def rows_of(ids: Sequence[int], salt: str | None = None) -> Array:
    """What stands for the rows of a prefix: each value tells its salt and all tokens up to it. [1, 2, rows, 4], float32."""
    values = np.zeros((1, 2, len(ids), 4), np.float32)
    seen = hash(salt) % 97
    for row, token in enumerate(ids):
        seen = (31 * seen + token + 1) % 65521
        values[0, :, row] = seen
    return values


def reader(ids: Sequence[int], salt: str | None = None) -> Callable[[range], list[Array]]:
    return lambda rows: [rows_of(ids, salt)[:, :, first : first + rows.step].copy() for first in rows]


def add(cache: PrefixCache, ids: Sequence[int], salt: str | None = None) -> None:
    cache.add(ids, salt, reader(ids, salt))


def found(cache: PrefixCache, ids: Sequence[int], salt: str | None = None) -> Array:
    blocks = cache.match(ids, salt)
    return np.concatenate(blocks, axis=2) if blocks else np.zeros((1, 2, 0, 4), np.float32)


prompts = st.lists(st.integers(0, 1), max_size=80)  # two tokens: prefixes are often shared
salts = st.sampled_from((None, "a", "b"))


@given(st.lists(st.tuples(prompts, salts), max_size=20), st.integers(0, 40))
def test_what_is_found_is_the_prompts_own_and_bytes_stay_within_bounds(
    asked: list[tuple[list[int], str | None]], blocks: int
) -> None:
    most = blocks * BLOCK_ROWS * ROW_BYTES
    cache = PrefixCache(most)
    kept: set[tuple[str | None, tuple[int, ...]]] = set()
    for ids, salt in asked:
        got = found(cache, ids, salt)
        rows = got.shape[2]
        assert rows % BLOCK_ROWS == 0
        assert rows < max(1, len(ids)), "the last token is always computed"
        np.testing.assert_array_equal(got, rows_of(ids, salt)[:, :, :rows])
        assert rows == 0 or (salt, tuple(ids[:rows])) in kept, "found what nobody gave"
        add(cache, ids, salt)
        kept |= {(salt, tuple(ids[:end])) for end in range(BLOCK_ROWS, len(ids) + 1, BLOCK_ROWS)}
        assert cache.num_bytes <= most
        if len(ids) // BLOCK_ROWS <= blocks:
            whole = (len(ids) - 1) // BLOCK_ROWS * BLOCK_ROWS
            assert found(cache, ids, salt).shape[2] == max(0, whole), "what was added last is there"


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(4 * BLOCK_ROWS * ROW_BYTES)
    first, second, third = ([n] * (2 * BLOCK_ROWS) for n in (1, 2, 3))
    add(cache, first)
    add(cache, second)
    found(cache, [*first, 0])  # the second is now the older one
    add(cache, third)
    assert [found(cache, [*ids, 0]).shape[2] for ids in (first, second, third)] == [2 * BLOCK_ROWS, 0, 2 * BLOCK_ROWS]


def test_a_shared_beginning_stays_while_anything_behind_it_is_used() -> None:
    cache = PrefixCache(3 * BLOCK_ROWS * ROW_BYTES)
    common = [7] * BLOCK_ROWS
    for tail in range(20):
        add(cache, [*common, *[tail] * BLOCK_ROWS])
        assert found(cache, [*common, 99]).shape[2] == BLOCK_ROWS
    assert cache.num_bytes == 3 * BLOCK_ROWS * ROW_BYTES


def test_only_new_blocks_are_read() -> None:
    cache, asked = PrefixCache(1 << 20), list[range]()
    ids = list(range(50))

    def read(rows: range) -> list[Array]:
        asked.append(rows)
        return reader(ids)(rows)

    cache.add(ids[:20], None, read)
    cache.add(ids, None, read)
    cache.add(ids, None, read)
    assert asked == [range(0, 16, 16), range(16, 48, 16)]


def test_a_memory_that_is_full_costs_what_was_to_be_kept_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    cache = PrefixCache(1 << 20)
    ids = list(range(40))
    add(cache, ids[:16])

    def read(rows: range) -> list[Array]:
        raise MemoryError

    with caplog.at_level(logging.WARNING, "dmtd"):
        cache.add(ids, None, read)
    assert "no memory left for the prefix cache" in caplog.text
    assert found(cache, ids).shape[2] == 16
    add(cache, ids)
    assert found(cache, ids).shape[2] == 32


def test_none_is_kept_where_none_is_wanted() -> None:
    cache = PrefixCache(0)
    cache.add([1] * 64, None, lambda rows: pytest.fail("read for nothing"))
    assert cache.match([1] * 64, None) == []
