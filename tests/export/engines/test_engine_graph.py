"""Engine graphs compute what the standard graphs compute, over any length that holds the rows seen, and say so in their I/O."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from engine_support import CAPACITY, load_engine_graph

from dmtd_export.graphs.engine import stored_weights

CASES = [("qwen3", 0, False), ("qwen2", 2, True), ("llama", 2, False), ("llama", 0, True)]
GRAPHS = ["thinking", "late_decode", "full_pass"]
BATCH, ROWS, COMMITTED, TABLE = 2, 3, 5, "model.embed_tokens.weight"


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def values(inputs: list[ort.NodeArg], table: np.ndarray, visible: int) -> dict[str, np.ndarray]:
    """Inputs of a run of ROWS rows over COMMITTED ones (late_decode: one row), by name; each name has its own values."""
    late = any(item.name == "thought" for item in inputs)
    rows = 1 if late else ROWS
    sizes = {"batch": BATCH, "window_len": rows, "late_len": 1, "num_logits": 1, "capacity": CAPACITY}
    fed = {}
    for item in inputs:
        dims = [sizes.get(dim, dim) for dim in item.shape]
        rng = np.random.default_rng(list(item.name.encode()))
        if item.name in ("embedding_table", "lm_head_table"):
            fed[item.name] = table
        elif item.name == "visible_rows":
            fed[item.name] = np.arange(visible)
        elif item.name == "input_ids":
            fed[item.name] = rng.integers(0, len(table), dims)
        elif item.name == "position_ids":
            fed[item.name] = np.arange(COMMITTED, COMMITTED + rows)[None].repeat(BATCH, 0)
        elif item.name == "late_write_indices" and not late:
            fed[item.name] = np.full(dims, COMMITTED + ROWS - 1)
        elif item.name.endswith("_write_indices"):
            fed[item.name] = np.full(dims, COMMITTED)
        elif item.name == "late_rows":
            fed[item.name] = np.full(dims, rows - 1)
        elif item.name == "logit_rows":
            fed[item.name] = np.zeros(dims, np.int64)
        elif item.name.startswith("gate_"):
            fed[item.name] = np.ones(dims, bool)
        else:
            # Everywhere, above what is committed too: whatever stands there must not be seen.
            fed[item.name] = rng.standard_normal(dims).astype(np.float32)
    return fed


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("family", "encoding", "tie"), CASES)
def test_numbers_are_the_standard_graphs_for_every_visible_length(
    bundles: Callable[..., Path], tmp_path: Path, family: str, encoding: int, tie: bool, name: str
) -> None:
    bundle = bundles(family=family, encoding=encoding, tie=tie, dtype="float32")
    graph = load_engine_graph(bundle, name)
    shutil.copyfile(bundle / "model.onnx.data", tmp_path / "model.onnx.data")
    onnx.save(graph.model, tmp_path / "engine.onnx")
    onnx.checker.check_model(tmp_path / "engine.onnx", full_check=True)
    standard, engine = session(bundle / f"{name}.onnx"), session(tmp_path / "engine.onnx")
    model = onnx.load(bundle / f"{name}.onnx")
    [table] = [onnx.numpy_helper.to_array(item) for item in model.graph.initializer if item.name == TABLE]
    expected = standard.run(None, values(standard.get_inputs(), table, 0))
    for visible in (COMMITTED + ROWS, 77, CAPACITY):
        got = engine.run(None, values(engine.get_inputs(), table, visible))
        for wanted, array, output in zip(expected, got, standard.get_outputs(), strict=True):
            np.testing.assert_allclose(array, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max(), err_msg=output.name)


def test_a_row_that_is_not_visible_changes_nothing(bundles: Callable[..., Path], tmp_path: Path) -> None:
    """What is cut off may even be NaN, which a mask alone would let through."""
    bundle = bundles(family="llama", encoding=0, tie=True, dtype="float32")
    shutil.copyfile(bundle / "model.onnx.data", tmp_path / "model.onnx.data")
    onnx.save(load_engine_graph(bundle, "late_decode").model, tmp_path / "engine.onnx")
    engine = session(tmp_path / "engine.onnx")
    fed = values(engine.get_inputs(), np.ones((128, 64), np.float32), 64)
    [clean] = engine.run(["logits"], fed)
    for name in fed:
        if name.startswith("past_key_values."):
            fed[name][:, :, 64:] = np.nan
    [stained] = engine.run(["logits"], fed)
    np.testing.assert_array_equal(clean, stained)
    assert np.isfinite(clean).all()


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("tie", [False, True])
def test_tables_are_inputs_and_capacity_is_fixed(bundles: Callable[..., Path], name: str, tie: bool) -> None:
    bundle = bundles(family="qwen3", encoding=0, tie=tie, dtype="float16")
    graph = load_engine_graph(bundle, name)
    head = {"lm_head_table": TABLE} if tie and name != "thinking" else {}
    assert graph.tables == {"embedding_table": TABLE} | head
    infos = {info.name: info for info in graph.inputs}
    for table in graph.tables:
        assert (infos[table].dims, infos[table].dtype) == ((128, 64), "float16")
    layers = {"thinking": [0, 1, 2], "late_decode": [3], "full_pass": [0, 1, 2, 3]}[name]
    pairs = {f"present.{i}.{kind}": f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")}
    assert graph.aliases == pairs
    for output in graph.outputs:
        if output.name in pairs:
            assert output.dims == ("batch", 2, CAPACITY, 16) == infos[pairs[output.name]].dims
    assert infos["visible_rows"].dims == ("visible_len",)
    assert TABLE not in stored_weights(graph.model)
    assert ("lm_head.weight" in stored_weights(graph.model)) == (not tie and name != "thinking")


def test_late_steps_and_passes_read_visible_rows_only(bundles: Callable[..., Path]) -> None:
    """Every attention reads a slice of both caches, whose whole length is nowhere counted; weights are the bundle's."""
    bundle = bundles(family="qwen3", encoding=0, tie=True, dtype="float16")
    for name in GRAPHS:
        model = load_engine_graph(bundle, name).model
        makers = {output: node for node in model.graph.node for output in node.output}
        caches = []
        for node in model.graph.node:
            if node.op_type == "Attention":
                cuts = [makers[node.input[i]] for i in (1, 2)]
                assert [makers[cut.input[2]].input[0] for cut in cuts] == ["visible_rows"] * 2
                assert [makers[cut.input[0]].op_type for cut in cuts] == ["TensorScatter"] * 2
                caches += [cut.input[0] for cut in cuts]
                assert makers[node.input[3]].input[0] == "visible_rows"
        assert sorted(caches) == sorted(output.name for output in model.graph.output if "present" in output.name)
        read = [node.op_type for node in model.graph.node for value in node.input if value.startswith("past_")]
        assert set(read) == {"TensorScatter"}
        standard = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        assert stored_weights(model).items() <= stored_weights(standard).items()
