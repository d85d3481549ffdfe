"""Cycle graphs that compute something else, in whichever branch, are caught."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from bundle_mutations import (
    another_embedding,
    caches_of_another_layer,
    edited_graph,
    epsilon_of_the_last_step,
    epsilon_of_the_window,
    gate_left_out,
    other_likeliest,
    reseal,
    scale_of_the_last_step,
    step_one_off,
    thought_left_out,
)

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_export.verify import verify_bundle
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """E0 T3 D2: the edits name layers."""
    place = tmp_path_factory.mktemp("mutations")
    split = SplitOptions(decoding_layers=2, cycle_length=3, cycle_origin="prompt", prompt_input="thinking")
    checkpoint = write_tiny_checkpoint(place / "model", layers=5)
    export_bundle(checkpoint, place / "bundle", ExportOptions(split=split, max_num_seqs=3, max_model_len=64))
    return place / "bundle"


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


CYCLE_EDITS = (
    other_likeliest,
    step_one_off,
    caches_of_another_layer,
    another_embedding,
    thought_left_out,
    epsilon_of_the_window,
    epsilon_of_the_last_step,
    scale_of_the_last_step,
)


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        *itertools.product(("cycle.ort.onnx", "cycle.ort.batch2.onnx", "cycle.ort.batch3.onnx"), CYCLE_EDITS),
        ("cycle.ort.batch3.onnx", gate_left_out),  # nothing but zeros is behind that gate where one sequence runs alone
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_edited_cycle_graph_is_caught(bundle: Path, file: str, edit: Callable[[onnx.ModelProto], None]) -> None:
    with edited_graph(bundle, file) as model:
        edit(model)
    reseal(bundle)
    assert verify_bundle(bundle, level="structure").ok, "the structure cannot tell"
    report = verify_bundle(bundle, level="oracle", quick=True)
    assert not report.ok
    failed = [check.name for check in report.checks if not check.ok]
    assert all(
        name.startswith(("whole cycles: onnxruntime, one graph, ", "tokens chosen in one go: ")) for name in failed
    )
