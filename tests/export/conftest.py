"""What tests of exports share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from export_support import export

from dmtd_export.options import WeightOptions
from dmtd_models.reference.testing import write_tiny_checkpoint


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    import torch  # most files here do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 4 bits, whose graphs verification runs as a twin of theirs too."""
    place = tmp_path_factory.mktemp("in_blocks")
    model = write_tiny_checkpoint(place / "model", layers=3)
    export(model, place / "bundle", formats=WeightOptions(weights="int4"), target="onnxruntime")
    return place / "bundle"
