"""KV buffers on the host: slots, rows, and pages that exist once they are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runtime_support import TinyBundles, private_bytes

from dmtd_runtime.backends.kv_cache import HostKvCache, kv_bytes
from dmtd_runtime.bundle.manifest import ModelInfo

PAGE_BYTES = 4096


@pytest.fixture(scope="module")
def model(tiny: TinyBundles) -> ModelInfo:
    return tiny.get().manifest.model  # 5 layers, 2 KV heads, head_dim 16, float32


def test_buffers_start_as_zeros_and_keep_their_place(model: ModelInfo) -> None:
    cache = HostKvCache(model, slots=3, capacity=10)
    for layer in range(5):
        key, value = cache.buffer(layer, "key"), cache.buffer(layer, "value")
        assert key.shape == value.shape == (3, 2, 10, 16)
        assert key.dtype == np.float32
        assert not key.any()
        assert not np.shares_memory(key, value)
        assert key.flags.writeable
        assert key.flags.c_contiguous
        assert cache.buffer(layer, "key") is key
    with pytest.raises(KeyError):
        cache.buffer(5, "key")


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_buffers_have_the_type_of_caches(model: ModelInfo, dtype: str, itemsize: int) -> None:
    cache = HostKvCache(replace(model, kv_dtype=dtype), slots=1, capacity=4)
    assert cache.buffer(0, "key").itemsize == itemsize


def test_a_forked_child_has_its_own_copy(model: ModelInfo) -> None:
    cache = HostKvCache(model, slots=1, capacity=4)
    maps = Path("/proc/self/maps").read_text().splitlines()
    address = cache.buffer(0, "key").ctypes.data
    [flags] = [
        line.split()[1]
        for line in maps
        if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
    ]
    assert flags == "rw-p", f"the buffer lies in a mapping {flags}"


def test_move_copies_the_first_rows_of_a_slot(model: ModelInfo) -> None:
    cache = HostKvCache(model, slots=3, capacity=6)
    for layer in range(5):
        for sign, kind in ((1, "key"), (-1, "value")):
            cache.buffer(layer, kind)[2] = sign * (layer + 1)
            cache.buffer(layer, kind)[0] = 99
    cache.move(2, 0, 4)
    for layer in range(5):
        for sign, kind in ((1, "key"), (-1, "value")):
            buffer = cache.buffer(layer, kind)
            assert (buffer[0, :, :4] == sign * (layer + 1)).all()
            assert (buffer[0, :, 4:] == 99).all()
            assert (buffer[2] == sign * (layer + 1)).all()
            assert not buffer[1].any()


def test_clear_wipes_nan(model: ModelInfo) -> None:
    cache = HostKvCache(model, slots=2, capacity=6)
    cache.buffer(3, "value")[:] = np.nan
    cache.clear(1, 4)
    buffer = cache.buffer(3, "value")
    assert (buffer[1, :, :4] == 0).all()
    assert np.isnan(buffer[1, :, 4:]).all()
    assert np.isnan(buffer[0]).all()


def test_kv_bytes_by_hand(model: ModelInfo) -> None:
    assert kv_bytes(model, 100) == 2 * 5 * 2 * 16 * 100 * 4
    assert kv_bytes(model, 100, layers=2) == 2 * 2 * 2 * 16 * 100 * 4
    assert kv_bytes(replace(model, kv_dtype="bfloat16"), 7) == 2 * 5 * 2 * 16 * 7 * 2
    assert kv_bytes(replace(model, kv_dtype="int8"), 7) == 2 * 5 * 2 * 16 * 7
    of_before = replace(model, dtype="float16", kv_dtype=None)  # caches had the model's type
    assert kv_bytes(of_before, 7) == 2 * 5 * 2 * 16 * 7 * 2


def test_pages_are_committed_as_rows_are_written(model: ModelInfo) -> None:
    capacity = 1 << 20
    before = private_bytes()
    cache = HostKvCache(model, slots=4, capacity=capacity)
    assert kv_bytes(model, 4 * capacity) > 5_000_000_000
    assert private_bytes() - before < 1 << 20, "5 GB of address space must not be memory"
    rows = 1000
    for layer in range(5):
        for kind in ("key", "value"):
            cache.buffer(layer, kind)[0, :, :rows] = 1
    written = kv_bytes(model, rows)
    assert private_bytes() - before > 0.9 * written, "the measure sees what is written"
    grown = private_bytes() - before
    # Each head's rows end in a page of their own.
    assert grown < written + 5 * 2 * 2 * 2 * PAGE_BYTES + (1 << 20)
    cache.close()
    assert private_bytes() - before < 1 << 20, "closing gives the memory back"
