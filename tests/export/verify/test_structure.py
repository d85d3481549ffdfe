"""Level ``structure``: what is damaged although all hashes fit is named by what it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_mutations import WEIGHTS, edit_weight, edited_graph, nodes_of, reseal, set_attribute
from export_support import export

from dmtd_export.verify import verify_bundle
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.contract import CONFIG_FILE


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("structure")
    export(write_tiny_checkpoint(place / "model", layers=3), place / "bundle")
    return place / "bundle"


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "expecting property name enclosed in double quotes in line 1, column 2"),
        (b"[]", "got a list, expected an object"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"model_type": "gpt2"}', 'model_type: got "gpt2", expected one of'),
    ],
)
def test_a_config_that_describes_no_model_is_a_failure(bundle: Path, content: bytes, words: str) -> None:
    (bundle / CONFIG_FILE).write_bytes(content)
    reseal(bundle)
    report = verify_bundle(bundle)
    assert not report.ok
    assert str(report.first_divergence).startswith(f"{CONFIG_FILE}; describes no model: {words}")
    assert str(report.first_divergence).endswith("; export the bundle again")


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_a_weight_that_holds_no_numbers_is_said_to(bundle: Path, value: float, words: str) -> None:
    name = "model.layers.1.input_layernorm.weight"
    edit_weight(bundle, name, lambda tensor: tensor.__setitem__(3, value))
    reseal(bundle)
    first = verify_bundle(bundle, level="structure").first_divergence
    assert first is not None and (first.graph, first.layer) == (WEIGHTS, 1)
    assert first.detail == f"norm of {name}, which holds {words}: the weight is not the one that was exported"


@pytest.mark.parametrize("file", ["full_pass.ort.onnx", "cycle.ort.onnx"])
@pytest.mark.parametrize("level", [0, 1])
def test_a_product_that_rounds_its_inputs_otherwise_is_named(
    in_blocks: Path, tmp_path: Path, file: str, level: int
) -> None:
    """The last one, which in the cycle graph stands in a branch. Level 0 is what a node without one has."""
    bundle = Path(shutil.copytree(in_blocks, tmp_path / "bundle"))
    with edited_graph(bundle, file) as model:
        node = nodes_of(model, "MatMulNBits")[-1]
        assert (node not in model.graph.node) == file.startswith("cycle")
        if level:
            set_attribute(node, "accuracy_level", level)
        else:
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)
    reseal(bundle)
    first = verify_bundle(bundle, level="structure").first_divergence
    assert first is not None and first.graph == file
    assert first.detail == f"accuracy_level of {node.name}: got {level}, expected 4; export the bundle again"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda model: setattr(model.functions[0].node[-1], "op_type", "Sub"), "is none that is exported"),
        (lambda model: model.ClearField("functions"), "is missing"),
    ],
)
def test_a_function_that_says_something_else_is_named(
    in_blocks: Path, tmp_path: Path, edit: Callable[[onnx.ModelProto], None], words: str
) -> None:
    """The runtime's own kernels compute what it is called, and never read what it says."""
    bundle = Path(shutil.copytree(in_blocks, tmp_path / "bundle"))
    with edited_graph(bundle, "cycle.ort.onnx") as model:
        edit(model)
    reseal(bundle)
    first = verify_bundle(bundle, level="structure").first_divergence
    assert first is not None and first.graph == "cycle.ort.onnx"
    assert first.detail == f"the function dmtd.MatMulNBits {words}; export the bundle again"


@pytest.mark.parametrize(
    ("file", "op", "attribute"),
    [
        ("full_pass.ort.onnx", "GroupQueryAttention", "local_window_size"),
        ("cycle.ort.onnx", "GroupQueryAttention", "local_window_size"),
        ("full_pass.onnx", "Attention", "is_causal"),
    ],
)
def test_an_attribute_of_attention_that_none_is_exported_with_is_named(
    tmp_path: Path, file: str, op: str, attribute: str
) -> None:
    """A window over the past changes numbers only where the past is longer than it, and verification's are short."""
    model = write_tiny_checkpoint(tmp_path / "model", layers=3)
    export(model, tmp_path / "bundle", target="all")
    with edited_graph(tmp_path / "bundle", file) as graph:
        node = nodes_of(graph, op)[-1]
        set_attribute(node, attribute, 32)
    reseal(tmp_path / "bundle")
    first = verify_bundle(tmp_path / "bundle", level="structure").first_divergence
    assert first is not None and first.graph == file
    assert first.detail.startswith(f"{node.name}: got the attribute {attribute}, expected none but ")
