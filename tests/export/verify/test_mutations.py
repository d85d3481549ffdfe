"""Every spoiled bundle is caught, and the divergence named, although all hashes fit; the unspoiled one passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundle_mutations import (
    WEIGHTS,
    edit_weight,
    edited_graph,
    edited_manifest,
    ignore_gate,
    invert_gate,
    length_one_off,
    mask_one_more,
    nodes_of,
    other_epsilon,
    other_scale,
    rename_input,
    reseal,
    swapped,
    write_one_row_off,
)

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_export.verify import VerifyReport, verify_bundle
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import Rope, SplitOptions
from dmtd_models.reference.rope import rotary_tables
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.errors import BundleError

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 5  # E0 T3 D2
OPTIONS = ExportOptions(
    split=SplitOptions(decoding_layers=2, cycle_length=3, cycle_origin="prompt", prompt_input="thinking"),
    max_num_seqs=3,
    max_model_len=64,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("mutations") / "model", layers=LAYERS)


@pytest.fixture(scope="module")
def pristine(checkpoint: Path) -> Path:
    export_bundle(checkpoint, checkpoint.parent / "bundle", OPTIONS)
    return checkpoint.parent / "bundle"


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def verify(bundle: Path, source: Path | None = None, level: str | None = None) -> VerifyReport:
    if source is None:
        return verify_bundle(bundle, quick=True, level=level)
    with open_checkpoint(source) as opened:
        return verify_bundle(bundle, checkpoint=opened, quick=True, level=level)


def failed(report: VerifyReport) -> list[str]:
    return [check.name for check in report.checks if not check.ok]


@pytest.mark.parametrize("level", ["structure", "graphs", "oracle"])
def test_the_unspoiled_bundle_passes(bundle: Path, checkpoint: Path, level: str) -> None:
    reseal(bundle)
    for source in (None, checkpoint):
        report = verify(bundle, source, level)
        assert report.ok, report.first_divergence
        assert report.level == level
        assert report.first_divergence is None


# --- weights -------------------------------------------------------------------------------------------------------


def alter_one(tensor: np.ndarray) -> None:
    tensor[3, 5] += 1e-3


def alter_by_one_ulp(tensor: np.ndarray) -> None:
    tensor[3, 5] = np.nextafter(tensor[3, 5], np.float32(9))


def alter_much(tensor: np.ndarray) -> None:
    tensor[3, 5] += 0.5


def swap_two_rows(tensor: np.ndarray) -> None:
    tensor[[0, 1]] = tensor[[1, 0]]


def swap_two_columns(tensor: np.ndarray) -> None:
    tensor[:, [2, 7]] = tensor[:, [7, 2]]


def transpose(tensor: np.ndarray) -> None:
    tensor[:] = tensor.T.copy()


@pytest.mark.parametrize(
    ("weight", "edit", "number"),
    [
        ("model.layers.2.mlp.down_proj.weight", alter_one, None),
        ("model.layers.3.mlp.gate_proj.weight", alter_by_one_ulp, None),
        ("model.embed_tokens.weight", alter_by_one_ulp, None),
        ("model.layers.1.self_attn.q_proj.weight", swap_two_rows, "probe"),
        ("model.layers.1.self_attn.q_proj.weight", swap_two_columns, "probe"),
        ("model.layers.4.self_attn.o_proj.weight", transpose, "probe"),
        ("lm_head.weight", swap_two_rows, "probe"),
    ],
)
@pytest.mark.parametrize("level", ["structure", "oracle"])
def test_a_weight_altered_in_place_is_named(
    bundle: Path, weight: str, edit: Callable, number: str | None, level: str
) -> None:
    edit_weight(bundle, weight, edit)
    reseal(bundle)
    report = verify(bundle, level=level)
    assert not report.ok
    first = report.first_divergence
    assert first is not None
    assert first.graph == WEIGHTS
    assert weight in first.detail
    assert first.layer == (int(weight.split(".")[2]) if "layers" in weight else None)
    assert isinstance(first.expected, float)
    assert isinstance(first.got, float)
    assert first.expected != first.got
    if number:
        assert first.detail.startswith(number)


@pytest.mark.parametrize("row", range(0, 12, 3))
def test_any_two_rows_that_change_places_are_seen(bundle: Path, row: int) -> None:
    def edit(tensor: np.ndarray) -> None:
        tensor[[row, row + 2]] = tensor[[row + 2, row]]

    edit_weight(bundle, "model.layers.0.mlp.up_proj.weight", edit)
    reseal(bundle)
    assert not verify(bundle, level="structure").ok


def test_an_altered_weight_with_new_numbers_is_caught_by_the_checkpoint(bundle: Path, checkpoint: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    edit_weight(bundle, name, alter_much, refingerprint=True)
    reseal(bundle)
    report = verify(bundle, checkpoint)
    assert report.level == "oracle"
    first = report.first_divergence
    assert first is not None
    assert (first.graph, first.layer) == (WEIGHTS, 2)
    assert name in first.detail
    assert first.got == pytest.approx(first.expected + 0.5)  # type: ignore[operator]
    # The numbers see it too: behind layer 2's keys and values, so at first in D's input.
    graphs = {c.name.split()[0]: c.divergence for c in report.checks if c.level == "oracle" and not c.ok}
    assert graphs["thinking.ort.onnx"] is not None
    assert "behind those of layer 2" in graphs["thinking.ort.onnx"].detail
    assert graphs["full_pass.onnx"] is not None
    assert graphs["full_pass.onnx"].layer == 3
    assert "behind the keys and values of layer 2" in graphs["full_pass.onnx"].detail


def test_without_a_checkpoint_the_report_says_what_it_rests_on(bundle: Path) -> None:
    assert any("recorded norms and probes" in note for note in verify(bundle).notes)


def test_without_new_hashes_the_tensor_is_named_rather_than_the_file(bundle: Path) -> None:
    edit_weight(bundle, "model.norm.weight", lambda tensor: tensor.__setitem__(0, 2.0))
    report = verify(bundle)
    assert report.first_divergence is not None
    assert "model.norm.weight" in report.first_divergence.detail
    assert "files: size and SHA-256" in failed(report)


def write_other_rope(bundle: Path, *, refingerprint: bool) -> None:
    tables = rotary_tables(Rope(theta=5000.0), 16, 64 + 256)
    for name, table in zip(("rotary.cos", "rotary.sin"), tables, strict=True):
        edit_weight(
            bundle,
            name,
            lambda tensor, table=table: tensor.__setitem__(slice(None), table),
            refingerprint=refingerprint,
        )
    reseal(bundle)


def test_a_wrong_rope_base_is_caught_by_its_numbers(bundle: Path) -> None:
    write_other_rope(bundle, refingerprint=False)
    report = verify(bundle)
    assert report.first_divergence is not None
    assert "rotary.cos" in report.first_divergence.detail


def test_a_wrong_rope_base_with_new_numbers_is_caught_by_the_oracle(bundle: Path) -> None:
    write_other_rope(bundle, refingerprint=True)
    assert verify(bundle, level="structure").ok
    report = verify(bundle)
    first = report.first_divergence
    assert first is not None
    assert "rotary" in first.detail
    assert first.position == 1
    thinking = next(c.divergence for c in report.checks if c.name.startswith("thinking.onnx"))
    assert thinking is not None
    assert (thinking.layer, thinking.position) == (0, 1)
    assert "present.0.key" in thinking.detail
    assert any(name.startswith("whole cycles") for name in failed(report))


# --- graphs --------------------------------------------------------------------------------------------------------


# Each fault once by default, in graphs of every kind; the same faults in the other graphs are slow.
GRAPH_EDITS = [
    ("late_decode.ort.onnx", ignore_gate, 3),
    ("full_pass.ort.batch3.onnx", invert_gate, 3),
    ("thinking.onnx", write_one_row_off, 1),
    ("thinking.ort.batch3.onnx", length_one_off, 1),
    ("thinking.ort.onnx", other_scale("GroupQueryAttention"), 2),
    ("full_pass.onnx", other_scale("Attention"), 2),
    ("thinking.ort.batch3.onnx", other_epsilon, 1),
    ("thinking.onnx", mask_one_more, 1),
    ("late_decode.onnx", swapped(3, 4), 3),
]
MORE_GRAPH_EDITS = [
    ("late_decode.onnx", ignore_gate, 3),
    ("full_pass.ort.onnx", ignore_gate, 3),
    ("full_pass.ort.batch2.onnx", invert_gate, 3),
    ("late_decode.onnx", invert_gate, 3),
    ("full_pass.onnx", write_one_row_off, 1),
    ("thinking.ort.onnx", length_one_off, 1),
    ("full_pass.onnx", other_epsilon, 1),
    ("full_pass.ort.onnx", swapped(1, 2), 1),
]


@pytest.mark.parametrize(
    ("file", "edit", "layer"),
    [*GRAPH_EDITS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_GRAPH_EDITS)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_edited_graph_is_caught_and_its_layer_named(bundle: Path, file: str, edit: Callable, layer: int) -> None:
    with edited_graph(bundle, file) as model:
        edit(model)
    reseal(bundle)
    assert verify(bundle, level="structure").ok, "the structure cannot tell"
    report = verify(bundle)
    first = report.first_divergence
    assert first is not None
    assert first.graph == file
    assert first.layer == layer, str(first)
    assert report.level == "oracle"


@pytest.mark.parametrize(
    ("file", "edit", "layer"),
    [GRAPH_EDITS[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in GRAPH_EDITS[3::3])],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_edited_graph_is_caught_without_a_reference(bundle: Path, file: str, edit: Callable, layer: int) -> None:
    with edited_graph(bundle, file) as model:
        edit(model)
    reseal(bundle)
    assert not verify(bundle, level="graphs").ok


@pytest.mark.parametrize(
    ("file", "op", "other"), [("choose_token.onnx", "ArgMax", "ArgMin"), ("sample_token.onnx", "Exp", "Sigmoid")]
)
def test_an_edited_token_choice_is_caught(bundle: Path, file: str, op: str, other: str) -> None:
    with edited_graph(bundle, file) as model:
        nodes_of(model, op)[0].op_type = other
    reseal(bundle)
    first = verify(bundle).first_divergence
    assert first is not None
    assert first.graph == file


# --- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["offset", "length"])
def test_a_place_that_is_no_number_is_named(bundle: Path, key: str) -> None:
    with edited_graph(bundle, "late_decode.onnx") as model:
        places = next(tensor.external_data for tensor in model.graph.initializer if tensor.external_data)
        next(place for place in places if place.key == key).value = "abc"
    reseal(bundle)
    first = verify(bundle, level="structure").first_divergence
    assert first is not None and first.graph == "late_decode.onnx" and "abc" in first.detail


@pytest.mark.parametrize("also_in_manifest", [False, True])
def test_a_renamed_input_is_named(bundle: Path, also_in_manifest: bool) -> None:
    with edited_graph(bundle, "late_decode.onnx") as model:
        rename_input(model, "thought", "thoughts")
    if also_in_manifest:
        with edited_manifest(bundle) as manifest:
            for graph in manifest["graphs"]:
                for item in graph["inputs"]:
                    if graph["file"] == "late_decode.onnx" and item["name"] == "thought":
                        item["name"] = "thoughts"
    reseal(bundle)
    first = verify(bundle).first_divergence
    assert first is not None
    assert first.graph == "late_decode.onnx"
    assert "thoughts" in first.detail
    assert ("contract" if also_in_manifest else "manifest") in first.detail


@pytest.mark.parametrize(
    ("file", "resealed"), [("thinking.ort.onnx", False), ("thinking.ort.onnx", True), (WEIGHTS, False)]
)
def test_a_truncated_file_is_named(bundle: Path, file: str, resealed: bool) -> None:
    content = (bundle / file).read_bytes()
    (bundle / file).write_bytes(content[: len(content) // 2])
    if resealed:
        reseal(bundle)
    report = verify(bundle)
    assert report.first_divergence is not None
    assert report.first_divergence.graph == file
    assert report.level == "structure"


def test_weights_shorter_than_the_manifest_lists_are_no_bundle(bundle: Path) -> None:
    content = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(content[: len(content) // 2])
    reseal(bundle)
    with pytest.raises(BundleError, match=f"the weights end at byte {len(content)}, {WEIGHTS} has {len(content) // 2}"):
        verify(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "late_decode.onnx").unlink()
    first = verify(bundle).first_divergence
    assert first is not None
    assert first.graph == "late_decode.onnx"
    assert first.got == "missing"


def test_an_altered_byte_of_an_asset_is_named(bundle: Path) -> None:
    path = bundle / "config.json"
    path.write_text(path.read_text().replace("qwen3", "qwen2", 1))
    report = verify(bundle)
    assert report.first_divergence is not None
    assert report.first_divergence.graph == "config.json"


def test_an_offset_that_reads_another_weight_is_named(bundle: Path) -> None:
    with edited_graph(bundle, "thinking.onnx") as model:
        tensors = {t.name: t for t in model.graph.initializer}
        a, b = (tensors[f"model.layers.{i}.input_layernorm.weight"] for i in (0, 1))
        for mine, theirs in zip(a.external_data, b.external_data, strict=True):
            mine.value = theirs.value
    reseal(bundle)
    first = verify(bundle).first_divergence
    assert first is not None
    assert first.graph == "thinking.onnx"
    assert "model.layers.0.input_layernorm.weight" in first.detail


def test_a_graph_of_another_split_is_named(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = ExportOptions(split=SplitOptions(decoding_layers=3, cycle_length=3), max_num_seqs=3, max_model_len=64)
    export_bundle(checkpoint, tmp_path / "other", other)
    shutil.copy(tmp_path / "other" / "late_decode.ort.onnx", bundle / "late_decode.ort.onnx")
    reseal(bundle)
    first = verify(bundle).first_divergence
    assert first is not None
    assert first.graph == "late_decode.ort.onnx"
    assert "past_key_values" in first.detail


def test_a_graph_of_another_model_of_the_same_shape_is_caught(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    config = model / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    export_bundle(model, tmp_path / "other", OPTIONS)
    shutil.copy(tmp_path / "other" / "thinking.onnx", bundle / "thinking.onnx")
    reseal(bundle)
    first = verify(bundle).first_divergence
    assert first is not None
    assert (first.graph, first.layer, first.position) == ("thinking.onnx", 0, 0)
