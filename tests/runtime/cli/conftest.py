"""A bundle for the command line."""

from __future__ import annotations

import pytest
from bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bundle(tmp_path_factory.mktemp("cli")))
