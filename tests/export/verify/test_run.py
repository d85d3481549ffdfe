"""A verification from end to end: what its stages tell, and what its report shows of the twins that it runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundle_mutations import edited_graph, nodes_of, reseal, set_attribute
from export_support import export

from dmtd_export.verify import verify_bundle
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import load_manifest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("file", ["thinking.ort.onnx", "full_pass.ort.onnx", "cycle.ort.onnx"])
def test_a_graph_that_cannot_be_run_is_named_by_its_file(in_blocks: Path, tmp_path: Path, file: str) -> None:
    bundle = Path(shutil.copytree(in_blocks, tmp_path / "bundle"))
    with edited_graph(bundle, file) as model:
        set_attribute(nodes_of(model, "MatMulNBits")[0], "block_size", 24)
    reseal(bundle)
    report = verify_bundle(bundle, quick=True)
    told = [check.detail for check in report.checks if not check.ok]
    told += [str(check.divergence) for check in report.checks if not check.ok]
    assert told and all(file in text for text in told)
    assert not any("partial" in text or str(tmp_path) in text for text in told), told


def test_a_tied_embedding_is_counted_each_time_it_is_read(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", layers=3, tie=True)
    export(model, tmp_path / "bundle", target="onnxruntime")
    told: list[tuple[str, int, int]] = []
    assert verify_bundle(tmp_path / "bundle", quick=True, progress=lambda *stage: told.append(stage)).ok
    weights = [name for name in load_manifest(tmp_path / "bundle").weights if not name.startswith("rotary.")]
    reads = len(weights) + 1
    steps = [(done, total) for stage, done, total in told if stage == "reference"]
    assert steps == [*((done, reads) for done in range(reads + 1)), (reads, reads)], (
        "counted, and then said to have ended"
    )
