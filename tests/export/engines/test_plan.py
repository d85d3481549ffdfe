"""Sizes, buckets, profiles and the key of a build."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_support import load_engine_graph

from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.plan import (
    Target,
    batch_buckets,
    choice_profile,
    engine_key,
    length_buckets,
    plan_build,
    profiles,
    ranges,
)
from dmtd_export.errors import ExportError
from dmtd_export.verify import largest_batch
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest, TensorInfo, load_manifest

RTX = Target(backend="tensorrt-rtx", version="1.7.1")


@pytest.fixture
def bundle(bundles: Callable[..., Path]) -> Path:
    return bundles(family="qwen3", encoding=0, tie=True, dtype="float16")


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    manifest = load_manifest(bundle)
    return dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, max_model_len=40960))


@pytest.mark.parametrize(
    ("capacity", "buckets"),
    [(64, (64,)), (256, (256,)), (320, (256, 320)), (4352, (256, 512, 1024, 2048, 4096, 4352)), (512, (256, 512))],
)
def test_length_buckets_double_up_to_the_capacity(capacity: int, buckets: tuple[int, ...]) -> None:
    assert length_buckets(capacity) == buckets


@pytest.mark.parametrize(
    ("most", "buckets"), [(1, (1,)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (32, (1, 2, 4, 8, 16, 32))]
)
def test_batch_buckets_double_up_to_the_largest(most: int, buckets: tuple[int, ...]) -> None:
    assert batch_buckets(most) == buckets


def test_capacity_holds_the_longest_sequence_and_a_padded_chunk(manifest: Manifest) -> None:
    plan = plan_build(manifest, BuildOptions())
    assert (plan.max_model_len, plan.capacity) == (4096, 4352)  # the bundle allows 40960
    odd = plan_build(manifest, BuildOptions(max_model_len=1000, prefill_chunk=100))
    assert odd.capacity == 1152  # the next multiple of 64
    assert plan_build(manifest, BuildOptions(max_model_len=40960)).capacity == 41216


@pytest.mark.parametrize(("exported", "built", "checked"), [((1,), 1, 1), ((1, 4), 4, 4), ((1, 16), 16, 8), ((), 8, 8)])
def test_engines_are_for_as_many_sequences_as_the_bundle_was_exported_for(
    manifest: Manifest, exported: tuple[int, ...], built: int, checked: int
) -> None:
    """``()``: a bundle without graphs of ONNX Runtime's own, which alone are made for a number of sequences."""
    [graph] = [graph for graph in manifest.graphs if graph.name == contract.THINKING]
    made = [dataclasses.replace(graph, dialect=contract.ONNXRUNTIME, slots=slots) for slots in exported]
    bundle = dataclasses.replace(manifest, graphs=(*manifest.graphs, *made))
    assert plan_build(bundle, BuildOptions()).max_num_seqs == built
    assert largest_batch(bundle) == checked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(max_num_seqs=0), "max_num_seqs: got 0, expected 1 to 64"),
        (BuildOptions(max_model_len=50000), "max_model_len: got 50000, expected 2 to 40960"),
        (BuildOptions(max_num_seqs=65), "max_num_seqs: got 65, expected 1 to 64"),
        (BuildOptions(prefill_chunk=512), "prefill_chunk: got 512, expected 3 to 256"),
        (BuildOptions(prefill_chunk=2), "prefill_chunk: got 2, expected 3 to 256"),
    ],
)
def test_sizes_outside_the_bundles_limits_are_refused(manifest: Manifest, options: BuildOptions, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        plan_build(manifest, options)


def test_late_steps_cut_short_lengths_and_read_long_ones_whole(bundle: Path, manifest: Manifest) -> None:
    """A cut moves three rows for each of its own: up to a third of 4352 it pays, that is up to the bucket 1024."""
    plan = plan_build(manifest, BuildOptions(max_num_seqs=4))
    assert plan.sliced_limit == 1024
    graph = load_engine_graph(bundle, "late_decode", plan.capacity)
    made = profiles(plan, "late_decode", graph.inputs)
    assert [(p.index, p.name, p.max_rows, p.min_visible, p.max_visible) for p in made] == [
        (0, "prefill", 256, 256, 4352),
        (1, "step", 1, 256, 1024),
        (2, "step_whole", 1, 4352, 4352),
    ]
    assert [p.visible_len(2048) for p in made] == [2048, 2048, 4352]
    prefill, step, whole = (p.inputs for p in made)
    assert prefill["input_ids"].max == (4, 256) and prefill["input_ids"].min == (1, 1)
    assert prefill["thought"].max == (4, 256, 64) and step["thought"].max == (4, 1, 64)
    assert step["visible_rows"].min == (256,) and step["visible_rows"].max == (1024,)
    assert whole["visible_rows"].min == whole["visible_rows"].max == (4352,)
    assert step["past_key_values.3.key"].min == (1, 2, 4352, 16)
    assert step["past_key_values.3.key"].max == (4, 2, 4352, 16)
    assert step["logit_rows"].max == (4, 1)
    assert "embedding_table" not in step  # its shape never changes


def test_thinking_takes_chunks_and_refills(bundle: Path, manifest: Manifest) -> None:
    plan = plan_build(manifest, BuildOptions(prefill_chunk=64))
    made = profiles(plan, "thinking", load_engine_graph(bundle, "thinking", plan.capacity).inputs)
    assert [(p.name, p.max_rows) for p in made] == [("prefill", 64), ("refill", 3)]
    refill = made[1].inputs
    assert (refill["input_ids"].min, refill["input_ids"].opt, refill["input_ids"].max) == ((1, 1), (1, 3), (8, 3))
    assert refill["late_rows"].max == (8, 1)


def test_a_small_capacity_has_no_cut_late_steps(bundle: Path, manifest: Manifest) -> None:
    plan = plan_build(manifest, BuildOptions(max_model_len=64))
    assert (plan.capacity, plan.sliced_limit) == (320, 0)
    made = profiles(plan, "late_decode", load_engine_graph(bundle, "late_decode", 320).inputs)
    assert [p.name for p in made] == ["prefill", "step_whole"]


def test_full_pass_is_built_besides_thinking(manifest: Manifest) -> None:
    assert plan_build(manifest, BuildOptions()).graphs == ("thinking", "late_decode")
    assert plan_build(manifest, BuildOptions(fused=True)).graphs == ("thinking", "late_decode", "full_pass")


def test_a_choice_profile_takes_one_row_a_sequence(manifest: Manifest) -> None:
    logits = TensorInfo(name="logits", dims=("batch", "num_logits", 128), dtype="float32")
    profile = choice_profile(plan_build(manifest, BuildOptions(max_num_seqs=4)), (logits,))
    assert profile.kind == "choose" and profile.inputs["logits"].max == (4, 1, 128)


def test_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(ExportError, match="got the dimension beams"):
        ranges((TensorInfo(name="x", dims=("beams",), dtype="bool"),), {"batch": (1, 1, 1)})


def test_the_key_changes_with_everything_that_makes_an_engine(manifest: Manifest) -> None:
    plan = plan_build(manifest, BuildOptions())
    graphs = [b"thinking", b"late_decode"]
    key = engine_key(plan, RTX, manifest, graphs)
    assert key.startswith("any-tensorrt-rtx-1.7.1-") and key == engine_key(plan, RTX, manifest, graphs)
    weights = dataclasses.replace(manifest.files["model.onnx.data"], sha256="0" * 64)
    others = [
        engine_key(plan_build(manifest, BuildOptions(max_num_seqs=4)), RTX, manifest, graphs),
        engine_key(plan_build(manifest, BuildOptions(fused=True)), RTX, manifest, graphs),
        engine_key(plan, dataclasses.replace(RTX, version="1.7.2"), manifest, graphs),
        engine_key(plan, dataclasses.replace(RTX, compute_capability="8.9"), manifest, graphs),
        engine_key(plan, dataclasses.replace(RTX, gpu_name="H200"), manifest, graphs),
        engine_key(
            plan, RTX, dataclasses.replace(manifest, files={**manifest.files, "model.onnx.data": weights}), graphs
        ),
        engine_key(plan, RTX, manifest, [b"thinking", b"other"]),
    ]
    assert len({key, *others}) == len(others) + 1
    verified = dataclasses.replace(manifest, verification={"level": "oracle"})
    assert engine_key(plan, RTX, verified, graphs) == key  # a new verification is no new engine
