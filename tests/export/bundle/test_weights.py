"""The weights file: every tensor once, bit for bit what the checkpoint holds or its correct rounding, and fingerprints."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from export_support import export, source_weights, stored_tensor

from dmtd_export.bundle.weights import Fingerprinter, fingerprint_of
from dmtd_export.errors import ExportError
from dmtd_models.reference.testing import write_tiny_checkpoint

PAGE = 4096
PROBE_OF_RAMP = -3.5911143836964587  # computed once with Python's own integers and floats
LAYER0 = "model.layers.0"
# What graphs read as one matrix.
STACKED = [
    [f"{LAYER0}.self_attn.{kind}_proj" for kind in "qkv"],
    [f"{LAYER0}.mlp.{kind}_proj" for kind in ("gate", "up")],
]


def rounded(values: np.ndarray, dtype: str) -> bytes:
    """Round to nearest even, by Python's own halves and by integer arithmetic, not by numpy casts."""
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    if dtype == "float16":
        return struct.pack(f"<{values.size}e", *values.astype(np.float64).ravel())
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source_dtype", ["float32", "float64", "float16", "bfloat16"])
def test_tensors_equal_the_checkpoints_or_their_rounding(tmp_path: Path, source_dtype: str, dtype: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", dtype=source_dtype, layers=2)
    manifest = export(source, tmp_path / "b", dtype=dtype)
    expected = source_weights(source, dtype=source_dtype)
    assert manifest["weights"].keys() == expected.keys() | {"rotary.cos", "rotary.sin"}
    for name, values in expected.items():
        stored = stored_tensor(tmp_path / "b", manifest, name)
        assert stored.shape == values.shape
        assert stored.tobytes() == rounded(values, dtype), name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1 + 2**-11, 1.0),  # half way: to even
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 + 2**-20, 1 + 2**-10),
        (65519.0, 65504.0),  # the largest that still rounds to a finite half
        (2**-25, 0.0),
        (2**-24, 2**-24),  # the smallest subnormal
        (-0.0, -0.0),
    ],
)
def test_halves_round_to_nearest_even(tmp_path: Path, value: float, expected: float) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    _alter(source, "model.norm.weight", 5, value)
    manifest = export(source, tmp_path / "b", dtype="float16")
    got = stored_tensor(tmp_path / "b", manifest, "model.norm.weight")[5]
    assert (float(got), np.signbit(got)) == (expected, np.signbit(expected))


@pytest.mark.parametrize(
    ("value", "dtype"), [(65520.0, "float16"), (np.nan, "float32"), (np.inf, "float32"), (3.4e38, "bfloat16")]
)
def test_a_value_that_the_type_cannot_hold_is_refused_by_name(tmp_path: Path, value: float, dtype: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    _alter(source, "model.layers.1.mlp.down_proj.weight", 7, value)
    with pytest.raises(ExportError, match=rf"model\.layers\.1\.mlp\.down_proj\.weight .*not finite in {dtype}"):
        export(source, tmp_path / "b", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "kind",
    [
        {"family": "qwen3", "tie": True},
        {"family": "qwen3", "tie": False},
        {"family": "qwen2", "tie": True},
        {"family": "llama", "qkv_bias": True, "mlp_bias": True},
    ],
    ids=["qwen3-tied", "qwen3", "qwen2", "llama-biases"],
)
def test_every_tensor_stands_once(tmp_path: Path, kind: dict, shards: int) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2, shards=shards, **kind)
    manifest = export(source, tmp_path / "b")
    expected = source_weights(source)
    assert ("lm_head.weight" in manifest["weights"]) == (not kind.get("tie", False))
    for name, values in expected.items():
        assert stored_tensor(tmp_path / "b", manifest, name).tobytes() == values.tobytes(), name
    # Behind one another without overlap; between them fewer zeros than a page, and nothing behind the last.
    raw = (tmp_path / "b/model.onnx.data").read_bytes()
    infos = sorted(manifest["weights"].values(), key=lambda info: info["offset"])
    end = 0
    for info in infos:
        gap = raw[end : info["offset"]]
        assert info["offset"] >= end and len(gap) < PAGE and not any(gap)
        assert not gap or info["offset"] % PAGE == 0
        assert info["length"] == np.prod(info["shape"]) * 4
        end = info["offset"] + info["length"]
    assert end == len(raw) == manifest["files"]["model.onnx.data"]["bytes"]
    tensor_bytes = sum(values.nbytes for values in expected.values()) + 2 * (256 + 256) * 8 * 4
    assert tensor_bytes <= len(raw) < tensor_bytes + PAGE * len(infos)


def test_matrices_that_are_read_as_one_stand_behind_one_another(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", family="llama", qkv_bias=True, mlp_bias=True)
    weights = export(source, tmp_path / "b")["weights"]
    for modules in STACKED:
        for suffix in ("weight", "bias"):
            infos = [weights[f"{module}.{suffix}"] for module in modules]
            assert infos[0]["offset"] % PAGE == 0
            for before, after in itertools.pairwise(infos):
                assert before["offset"] + before["length"] == after["offset"]


@pytest.mark.parametrize("tie", [True, False])
def test_graphs_read_all_weights_of_their_layers_and_no_other_bytes(tmp_path: Path, tie: bool) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", tie=tie)  # E0 T3 D1
    weights = export(source, tmp_path / "b")["weights"]
    tables = {"rotary.cos", "rotary.sin"}
    layer = {i: {n for n in weights if n.startswith(f"model.layers.{i}.")} for i in range(4)}
    head = {"model.norm.weight", "model.embed_tokens.weight" if tie else "lm_head.weight"}
    embedding = {"model.embed_tokens.weight"}
    expected = {
        "full_pass": set(weights),
        "thinking": embedding | tables | layer[0] | layer[1] | layer[2],
        "late_decode": embedding | tables | layer[3] | head,
    }
    for graph, suffix in itertools.product(expected, (".onnx", ".ort.onnx")):
        model = onnx.load(tmp_path / "b" / (graph + suffix), load_external_data=False)
        ranges = []
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                assert place["location"] == "model.onnx.data"
                assert int(place["length"]) == np.prod(tensor.dims) * 4
                ranges.append((int(place["offset"]), int(place["offset"]) + int(place["length"])))
        read = {
            name
            for name, info in weights.items()
            if any(low <= info["offset"] and info["offset"] + info["length"] <= high for low, high in ranges)
        }
        assert read == expected[graph], graph + suffix
        assert sum(high - low for low, high in ranges) == sum(weights[name]["length"] for name in read)
        assert (tmp_path / "b" / (graph + suffix)).stat().st_size < 1 << 20


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(128, 64), (96, 1), (64,)], ids=str)
def test_fingerprint_sees_one_altered_element_wherever_it_stands(shape: tuple[int, ...], dtype: type) -> None:
    rng = np.random.default_rng(1)
    tensor = (rng.standard_normal(shape) * 0.1).astype(dtype)
    original = fingerprint_of(tensor)
    assert original.matches(fingerprint_of(tensor.copy()))
    for place in rng.integers(0, tensor.size, 40):
        for change in (0.001, -0.05, 3.0):
            altered = tensor.astype(np.float32)
            altered.flat[place] += change
            altered = altered.astype(dtype)
            if altered.flat[place] != tensor.flat[place]:
                assert not original.matches(fingerprint_of(altered)), (place, change)


def test_fingerprint_sees_every_swap_of_rows_columns_and_elements() -> None:
    rng = np.random.default_rng(2)
    tensor = (rng.standard_normal((40, 24)) * 0.02).astype(np.float32)
    original = fingerprint_of(tensor)
    for axis in (0, 1):
        for one, other in itertools.combinations(range(tensor.shape[axis]), 2):
            order = np.arange(tensor.shape[axis])
            order[[one, other]] = order[[other, one]]
            assert not original.matches(fingerprint_of(np.take(tensor, order, axis))), (axis, one, other)
    assert not original.matches(fingerprint_of(-tensor))
    assert not original.matches(fingerprint_of(tensor[::-1]))
    swapped = tensor.copy()
    swapped[3, 5], swapped[30, 20] = tensor[30, 20], tensor[3, 5]
    assert not original.matches(fingerprint_of(swapped))


def test_fingerprint_is_the_same_in_any_chunks_and_for_ever() -> None:
    tensor = np.arange(-60, 60, dtype=np.float32).reshape(24, 5) / 64
    whole = fingerprint_of(tensor)
    for step in (1, 5, 23):
        parts = Fingerprinter()
        for start in range(0, 24, step):
            parts.add(tensor[start : start + step])
        assert whole.matches(parts.finish())
        assert parts.finish().probe == pytest.approx(whole.probe, rel=1e-13)
    # Bundles on disk depend on the factors: other numbers here break every bundle that exists.
    assert whole.norm == pytest.approx(float(np.sqrt(np.sum((np.arange(-60, 60) / 64) ** 2))), rel=1e-15)
    assert whole.probe == pytest.approx(PROBE_OF_RAMP, rel=1e-12)


def test_a_tensor_of_zeros_matches_itself_and_nothing_else() -> None:
    zeros = np.zeros((4, 4), np.float32)
    one = zeros.copy()
    one[2, 1] = 1e-6
    assert fingerprint_of(zeros).matches(fingerprint_of(zeros))
    assert not fingerprint_of(zeros).matches(fingerprint_of(one))


def _alter(checkpoint: Path, name: str, place: int, value: float) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].flat[place] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
