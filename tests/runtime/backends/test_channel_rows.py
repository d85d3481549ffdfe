"""int8-channel: where D is in floats, nothing that goes on beside a sequence changes a bit of its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forced_support import ALONE, COMPANY_AND_CUTS, first_logits

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import Manifest, load_manifest

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    place = tmp_path_factory.mktemp("channels")
    checkpoint = write_tiny_checkpoint(place / "model", layers=4, tokenizer=True)
    (place / "text.txt").write_text("the cat sat on a mat and looked at its tail again; " * 40)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=2, cycle_length=4),
        max_num_seqs=4,
        max_model_len=128,
        formats=WeightOptions(weights="float", weights_thinking="int8-channel"),
        calibration=(str(place / "text.txt"),),
        target="onnxruntime",
        verify=False,
    )
    export_bundle(checkpoint, place / "bundle", options)
    return place / "bundle", load_manifest(place / "bundle")


@pytest.mark.parametrize("plain", [False, True], ids=["cycles", "plain"])
def test_neighbours_and_chunks_change_no_bit(opened: tuple[Path, Manifest], plain: bool) -> None:
    whole = first_logits(*opened, *ALONE, plain=plain)
    assert np.ptp(whole, axis=-1).min() > 0
    for company in COMPANY_AND_CUTS:
        assert np.array_equal(first_logits(*opened, *company, plain=plain), whole), company
