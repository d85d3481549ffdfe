"""What is moved into huge pages, told by real mappings of this process; and that nothing but speed depends on it."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import TinyBundle

from dmtd_runtime.backends.onnxruntime import backend
from dmtd_runtime.llm import LLM
from dmtd_runtime.machine import huge_pages
from dmtd_runtime.machine.hardware import huge_pages_setting
from dmtd_runtime.machine.huge_pages import HUGE_PAGE, in_huge_pages
from dmtd_runtime.ort.session import open_session
from dmtd_runtime.sampling.params import SamplingParams

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone has huge pages")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """What is moved, instead of moving it, on a machine that has huge pages."""
    parts: list[range] = []
    monkeypatch.setattr(huge_pages, "_move", parts.append)
    monkeypatch.setattr(huge_pages, "huge_pages_setting", lambda: "madvise")
    return parts


def _mapped(blocks: int, *, filled: bool) -> tuple[mmap.mmap, range]:
    """Private memory, and where it lies."""
    pages = mmap.mmap(-1, blocks * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)  # so that a page is there once it is written, and no other
    array = np.frombuffer(pages, np.uint8)
    if filled:
        array[:: mmap.PAGESIZE] = 7
    else:
        array[0] = 7
    start = array.ctypes.data
    return pages, range(start, start + blocks * HUGE_PAGE)


def _shared(part: range, parts: list[range]) -> int:
    """Bytes of ``part`` that are among ``parts``."""
    return sum(max(0, min(part.stop, other.stop) - max(part.start, other.start)) for other in parts)


def test_what_is_new_and_full_is_moved_and_nothing_else(moved: list[range]) -> None:
    old, was_there = _mapped(4, filled=True)
    with in_huge_pages():
        full, new = _mapped(4, filled=True)
        empty, hardly_used = _mapped(4, filled=False)
        assert not moved, "while the block runs it may still be freed"
    assert _shared(new, moved) >= 3 * HUGE_PAGE, "all of it but the edges, which no huge page covers whole"
    assert _shared(was_there, moved) == 0
    # Where it borders on memory in use, a huge page may be made of both.
    assert _shared(hardly_used, moved) <= HUGE_PAGE / 4
    assert all(part.start % HUGE_PAGE == part.stop % HUGE_PAGE == 0 for part in moved)
    for pages in (old, full, empty):
        assert pages[0] == 7


@pytest.mark.parametrize("found", ["never", None])
def test_a_machine_without_them_is_left_as_it_is(
    moved: list[range], monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    monkeypatch.setattr(huge_pages, "huge_pages_setting", lambda: found)
    with in_huge_pages():
        _full, _ = _mapped(4, filled=True)
    assert not moved


def test_an_error_passes_and_nothing_is_moved(moved: list[range]) -> None:
    def fail() -> None:
        with in_huge_pages():
            _full, _ = _mapped(4, filled=True)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert not moved


def test_moving_keeps_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own answer, whatever it is able to do now."""
    monkeypatch.setattr(huge_pages, "huge_pages_setting", lambda: "madvise")
    with in_huge_pages():
        pages = mmap.mmap(-1, 6 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(pages, np.int64)
        array[:] = np.arange(array.size)
    assert np.array_equal(array, np.arange(array.size))


def test_sessions_are_opened_within_it(bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        events.append("begins")
        with in_huge_pages():
            yield
        events.append("ends")

    def opened(*arguments: Any, **options: Any) -> Any:
        events.append("session")
        return open_session(*arguments, **options)

    monkeypatch.setattr(backend, "in_huge_pages", noted)
    monkeypatch.setattr(backend, "open_session", opened)
    with LLM(bundle.directory, threads=1) as llm:
        assert (events[0], *set(events[1:-1]), events[-1]) == ("begins", "session", "ends")
        [output] = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert output.outputs[0].token_ids == bundle.greedy_tokens([1, 2], 5)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never\n", "always"),
        ("always madvise [never]\n", "never"),
        ("\n", None),
    ],
)
def test_the_machine_s_setting(tmp_path: Path, text: str, found: str | None) -> None:
    assert huge_pages_setting(tmp_path) is None
    place = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    place.parent.mkdir(parents=True)
    place.write_text(text)
    assert huge_pages_setting(tmp_path) == found
