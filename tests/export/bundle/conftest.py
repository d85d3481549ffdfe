"""An old bundle, and the checkpoints that new ones are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_support import export, snapshot

from dmtd_models.reference.testing import write_tiny_checkpoint


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("sources")
    return [write_tiny_checkpoint(place / str(seed), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def weights_of(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hash of the weights file -> the checkpoint it must come from."""
    place = tmp_path_factory.mktemp("expected")
    found = {}
    for source in sources:
        export(source, place / source.name)
        found[snapshot(place / source.name)["model.onnx.data"]] = source.name
    assert len(found) == len(sources)
    return found


@pytest.fixture
def target(sources: list[Path], tmp_path: Path) -> Path:
    """An old bundle, alone in its directory."""
    export(sources[0], tmp_path / "place" / "b")
    return tmp_path / "place" / "b"
