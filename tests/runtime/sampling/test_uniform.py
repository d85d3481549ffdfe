"""The uniform numbers of a seed: Philox against its published vector, numpy's, and the paper's figure."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dmtd_runtime.sampling.sampler import uniform

WORD = 2**64


def philox_first_word(counter: Sequence[int], key: Sequence[int]) -> int:
    """Philox4x64-10 from the paper's figure, on lists, apart from the code under test."""
    x = list(counter)
    k = list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], WORD)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], WORD)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) % WORD, (k[1] + 0xBB67AE8584CAA73B) % WORD]
    return x[0]


def test_uniform_of_zeros_is_the_published_vector() -> None:
    # Random123's known answer: philox4x64, 10 rounds, counter and key all zero, first word 16554d9eca36314c.
    assert uniform(0, 0, 0) == (0x16554D9ECA36314C >> 11) / 2**53


@given(seed=st.integers(0, WORD - 1), sequence=st.integers(0, WORD - 1), token_index=st.integers(0, WORD - 1))
def test_uniform_equals_two_other_implementations(seed: int, sequence: int, token_index: int) -> None:
    value = uniform(seed, sequence, token_index)
    assert 0 <= value < 1
    assert value == (philox_first_word([token_index, sequence, 0, 0], [seed, 0]) >> 11) / 2**53
    # numpy steps its counter before the first block, so it starts one below.
    start = (sequence * WORD + token_index - 1) % 2**256
    numpys = int(np.random.Philox(key=seed, counter=start).random_raw())
    assert value == (numpys >> 11) / 2**53


def test_negative_seed_counts_modulo_two_to_the_64() -> None:
    assert uniform(-1, 3, 4) == uniform(WORD - 1, 3, 4)


def test_uniform_differs_by_every_argument() -> None:
    values = {uniform(seed, seq, index) for seed in range(10) for seq in range(10) for index in range(10)}
    assert len(values) == 1000
