"""A bundle with room for answers of a form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from runtime_support import TinyBundle

    from dmtd_runtime import LLM


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    from runtime_support import make_bundle

    return make_bundle(tmp_path_factory.mktemp("structured"), max_positions=1024)


@pytest.fixture(scope="module")
def llm(bundle: TinyBundle) -> Iterator[LLM]:
    from dmtd_runtime import LLM

    with LLM(bundle.directory, max_num_seqs=8, threads=1, prefix_cache_bytes=0) as llm:
        yield llm
