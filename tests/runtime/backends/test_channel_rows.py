"""int8-channel: where D is in floats, nothing that goes on beside a sequence changes a bit of its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_export.verify.forced import forced_logits
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bundle.manifest import Manifest, load_manifest
from dmtd_runtime.cycle import CyclePlan

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
    directory, manifest = opened
    rng, vocab, new = np.random.default_rng(0), manifest.model.vocab_size, 7
    prompts = [rng.integers(0, vocab, length).tolist() for length in (64, 5, 23)]
    tokens = [rng.integers(0, vocab, new).tolist() for _ in prompts]

    def logits(count: int, chunk: int) -> np.ndarray:
        backend = open_backend(directory, manifest, BackendOptions(max_num_seqs=count, max_model_len=128, threads=1))
        try:
            plan = CyclePlan(cycle=manifest.cycle, plain=plain)
            given = prompts[:count], tokens[:count], [new] * count
            return forced_logits(backend, plan, *given, vocab_size=vocab, max_rows=chunk)[0]
        finally:
            backend.close()

    whole = logits(1, 64)
    assert np.ptp(whole, axis=-1).min() > 0
    for count, chunk in ((1, 1), (1, 3), (1, 8), (1, 23), (3, 64), (3, 5)):
        assert np.array_equal(logits(count, chunk), whole), (count, chunk)
