"""The library of ``dmtd_runtime/ort/kernels``: when it is taken, and what is said where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmtd_runtime.errors import BackendError
from dmtd_runtime.ort.kernels import library as kernels

SETS = kernels.SETS
WHOLE = kernels.LIBRARY


@pytest.fixture
def asked_anew() -> Iterator[None]:
    kernels.instruction_set.cache_clear()
    yield
    kernels.instruction_set.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_the_variable_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for value in (SETS[0], kernels.OFF, ""):
        monkeypatch.setenv(kernels.VARIABLE, value)
        kernels.instruction_set.cache_clear()
        seen[value] = kernels.instruction_set()
    assert seen[kernels.OFF] is None and seen[SETS[0]] in ("avx2", None) and seen[""] in (*SETS, None)


@pytest.mark.usefixtures("asked_anew")
def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "avx1024")
    with pytest.raises(BackendError, match="DMTD_KERNELS: got 'avx1024', expected one of off, avx2, avx512"):
        kernels.instruction_set()


@pytest.mark.usefixtures("asked_anew")
def test_a_library_that_is_missing_or_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "libdmtd_kernels.so"
    monkeypatch.setattr(kernels, "LIBRARY", place)
    assert kernels.instruction_set() is None
    monkeypatch.setenv(kernels.VARIABLE, "avx2")
    kernels.instruction_set.cache_clear()
    with pytest.raises(BackendError, match="DMTD_KERNELS=avx2: there is no libdmtd_kernels"):
        kernels.instruction_set()
    monkeypatch.delenv(kernels.VARIABLE)
    whole = WHOLE.read_bytes() if WHOLE.is_file() else b"\x7fELF\x02" + bytes(100)
    other_machine = whole[:0x12] + b"\xb7\x00" + whole[0x14:]
    for content in (b"", b"not a library" * 100, whole[:50_000], whole[:-1], other_machine):
        place.write_bytes(content)
        kernels.instruction_set.cache_clear()
        with pytest.raises(BackendError, match=r"so is damaged, or for another machine; install dmtd again, or set"):
            kernels.instruction_set()
