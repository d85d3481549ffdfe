"""Opening and closing again and again: memory stays flat, no thread and no descriptor is left."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
from runtime_support import growth, make_bundle, private_bytes

from dmtd_runtime import LLM, SamplingParams

ROUNDS, SLOW_ROUNDS, WARM_UP = 14, 24, 6
GROWTH_BYTES = 3 << 20  # of all the rounds after the warm-up; a leaked session or cache holds more than this each
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of its own, with room for 32 k tokens."""
    return make_bundle(tmp_path_factory.mktemp("memory"), max_positions=32_768).directory


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("full_pass", "rounds"),
    [
        ("staged", ROUNDS),
        pytest.param("staged", SLOW_ROUNDS, marks=pytest.mark.slow),
        pytest.param("fused", SLOW_ROUNDS, marks=pytest.mark.slow),
    ],
)
def test_open_generate_close_stays_flat(directory: Path, full_pass: str, rounds: int) -> None:
    threads = threading.active_count()
    marks = []
    for _ in range(rounds):
        with LLM(directory, max_num_seqs=2, full_pass=full_pass, threads=1) as llm:
            llm.generate([[1, 2, 3], [4, 5]], GREEDY)
            with llm.stream([1], SamplingParams(temperature=0, ignore_eos=True)) as stream:
                next(stream)
        gc.collect()
        marks.append((private_bytes(), open_descriptors()))
    memory, descriptors = zip(*marks, strict=True)
    assert growth(memory[WARM_UP:]) < GROWTH_BYTES, f"MB: {[round(b / 1e6, 1) for b in memory]}"
    assert descriptors[-1] == descriptors[0]
    assert threading.active_count() == threads


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(SLOW_ROUNDS, marks=pytest.mark.slow)])
def test_dropping_without_close_stays_flat(directory: Path, rounds: int) -> None:
    marks = []
    for _ in range(rounds):
        llm = LLM(directory, threads=1)
        llm.generate([1, 2, 3], GREEDY)
        thread = llm._worker._thread
        del llm
        gc.collect()
        thread.join(120)
        assert not thread.is_alive()
        marks.append(private_bytes())
    assert growth(marks[WARM_UP:]) < GROWTH_BYTES, f"MB: {[round(b / 1e6, 1) for b in marks]}"


def test_room_for_long_texts_is_not_memory(directory: Path) -> None:
    """8 slots of 32 k tokens would be 340 MB of keys and values."""
    options = {"max_num_seqs": 8, "threads": 1}
    with LLM(directory, max_model_len=64, **options) as llm:
        llm.generate([1, 2, 3], GREEDY)
        small = private_bytes()
    gc.collect()
    with LLM(directory, **options) as llm:
        assert llm.max_model_len == 32_768
        llm.generate([1, 2, 3], GREEDY)
        assert private_bytes() - small < 100 << 20


def test_many_requests_on_one_llm_stay_flat(directory: Path) -> None:
    marks = []
    with LLM(directory, max_num_seqs=4, threads=1) as llm:
        for _ in range(20):
            for _ in range(8):
                llm.generate([[1, 2, 3]] * 4, GREEDY)
            marks.append(private_bytes())
        assert growth(marks[3:]) < GROWTH_BYTES, f"MB: {[round(b / 1e6, 1) for b in marks]}"
        assert llm._requests == {}


def test_what_is_judged_as_growth() -> None:
    """A leak of a tenth of a megabyte a round is; four more megabytes in two rounds, whichever they are, are not."""
    base, step = 677 << 20, 4 << 20
    noise = [(7 * i % 5) << 14 for i in range(40)]
    for first, second in ((5, 6), (3, 39), (20, 38)):
        flat = [base + noise[i] + step * (i >= first) + step * (i >= second) for i in range(40)]
        assert growth(flat) < GROWTH_BYTES
    assert growth([base + i * (100 << 10) + noise[i] for i in range(40)]) > GROWTH_BYTES
