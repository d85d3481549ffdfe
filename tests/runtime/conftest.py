"""Tiny bundles for the whole session, and a cache directory of their own for what the runtime remembers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from runtime_support import TinyBundle, TinyBundles

    from dmtd_runtime import LLM


@pytest.fixture(scope="session", autouse=True)
def _own_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyBundles]:
    from runtime_support import TinyBundles  # loads torch, which most files here do without

    bundles = TinyBundles(tmp_path_factory.mktemp("tiny"))
    yield bundles
    bundles.close()


@pytest.fixture(scope="module")
def bundle(tiny: TinyBundles) -> TinyBundle:
    return tiny.get()


@pytest.fixture(scope="module")
def llm(bundle: TinyBundle) -> Iterator[LLM]:
    from dmtd_runtime import LLM

    with LLM(bundle.directory, max_num_seqs=4, threads=1) as llm:
        yield llm
