"""An old bundle, and the checkpoints that new ones are made of; a place where input goes bad."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_tiny_checkpoint(place / "m", tokenizer=True, tie=True)
    write_tiny_checkpoint(place / "s", shards=3)
    export(place / "m", place / "b")
    return place


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: checkpoints ``m`` (one file) and ``s`` (three shards), and ``b``, a bundle of ``m``."""
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "place"
