"""Quantised bundles: what a sequence's logits depend on. Its own rows, each rounded by itself, and never its neighbours'.

MEASURED (row counts 1 to 512, chunks, neighbours): with AVX-512 VNNI the same bits; with AVX2 alone 4 bits differ by 1e-7 of the
largest value up to 23 rows and 6e-5 at 64 in one product, which the next product's rounding of inputs may make a step of.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from forced_support import ALONE, COMPANY_AND_CUTS, first_logits
from onnx import helper, numpy_helper

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import Manifest, load_manifest
from dmtd_runtime.ort.kernels.library import instruction_set
from dmtd_runtime.ort.library import import_onnxruntime

ROWS = (1, 2, 3, 4, 5, 8, 23, 64, 512)
STEP_APART = 0.02  # of the largest logit: inputs that fall on another step of int8 here and there, in 4 layers


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_rounds_each_row_by_itself(bits: int) -> None:
    """A neighbour a million times as large: were the rows rounded with one scale, nothing of the first would be left."""
    rng, (rows, columns) = np.random.default_rng(bits), (96, 128)
    attrs = {"N": rows, "K": columns, "bits": bits, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attrs)
    codes = rng.integers(0, 256, (rows, 4, 4 * bits)).astype(np.uint8)
    graph = helper.make_graph(
        [node],
        "rows",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(codes, "codes"),
            numpy_helper.from_array(rng.standard_normal((rows, 4)).astype(np.float32), "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.standard_normal((max(ROWS), columns)).astype(np.float32)
    x[1:] *= 1e6
    (alone,) = session.run(None, {"x": x[:1]})
    for count in ROWS:
        (together,) = session.run(None, {"x": x[:count]})
        assert np.abs(together[0] - alone[0]).max() <= 5e-4 * np.abs(alone).max(), count


@pytest.fixture(scope="module", params=["int4", "int8"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("rows")
    checkpoint = write_tiny_checkpoint(root / "model", layers=4)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=1, cycle_length=3),
        max_num_seqs=3,
        formats=WeightOptions(weights=request.param),
    )
    export_bundle(checkpoint, root / "bundle", options)
    return root / "bundle", load_manifest(root / "bundle")


@pytest.mark.parametrize("plain", [False, True], ids=["cycles", "plain"])
def test_neighbours_and_chunks_change_logits_by_rounding_at_most(opened: tuple[Path, Manifest], plain: bool) -> None:
    alone = first_logits(*opened, *ALONE, plain=plain)
    room = 0 if instruction_set() else STEP_APART * np.abs(alone).max()
    for company in COMPANY_AND_CUTS:
        assert np.abs(first_logits(*opened, *company, plain=plain) - alone).max() <= room, company
