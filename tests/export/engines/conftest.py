"""Bundles that the files of this folder share, exported once each, and a cache directory of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import make_bundle


@pytest.fixture(scope="module", autouse=True)
def _own_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``bundles(family=..., encoding=..., dtype=..., tie=...)``: the same bundle for the same words. Do not write into it."""
    made: dict[str, Path] = {}

    def bundle(**words: Any) -> Path:
        key = repr(sorted(words.items()))
        if key not in made:
            made[key] = make_bundle(tmp_path_factory.mktemp("bundle"), **words)
        return made[key]

    return bundle
