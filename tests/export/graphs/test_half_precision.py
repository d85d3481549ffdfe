"""float16 and bfloat16 graphs against float32 graphs of the same (half-rounded) weights, teacher-forced, and what is
float32 inside them.

Unit: one ULP of the half type at the largest |logit|. Every case runs 24 rows and then 8 more over the 24 now in the
cache, so rounded keys and values are read back. Margins, and the worst that was measured in the cases below (random
weights, 6 layers and hidden size 64, in which rounding weighs more than in a trained model):

| graphs | run by | margin | measured | top-1 equal | measured |
|---|---|---|---|---|---|
| float16, onnxruntime dialect | ONNX Runtime, CPU | 16 ULP | 7.4 ULP | 90% | 32 of 32 |
| float16, standard dialect | ONNX Runtime, CPU | 16 ULP | 5.1 ULP | 90% | 31 of 32 |
| float16, standard dialect | ONNX's reference evaluator | 16 ULP | 7.6 ULP | 90% | 32 of 32 |
| bfloat16, standard dialect | ONNX's reference evaluator | 16 ULP | 8.6 ULP | 80% | 28 of 32 |

Where the top token differs, the float32 top two must be closer than twice the margin. ONNX Runtime has no bfloat16 kernels
on the CPU, and its own operators have no reference implementation: bfloat16 in the onnxruntime dialect is not run here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from export_support import DTYPES, export, read_manifest
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, SamplingParams

Feeds = Mapping[str, np.ndarray]
Run = Callable[[Path, Feeds], list[Any]]
MARGIN_ULP = 16.0
TOP1_EQUAL = {"float16": 0.9, "bfloat16": 0.8}
MANTISSA_BITS = {"float16": 10, "bfloat16": 7}
FLOAT = onnx.TensorProto.FLOAT
HALF = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
CAPACITY = 64
CUTS = ((0, 24), (24, 32))
CASES = [
    ("qwen3", {"tie": True}),
    ("qwen3", {}),
    ("qwen2", {}),
    ("llama", {"qkv_bias": True, "mlp_bias": True}),
    ("qwen3", {"head_dim": 128}),  # whose root is no power of two
    ("llama", {"head_dim": 128}),  # looked at alone: without norms of q and k its random attention is as sharp as noise
]
CASE_IDS = ["qwen3-tied", "qwen3", "qwen2", "llama-biases", "qwen3-128", "llama-128"]
RUN = range(len(CASES) - 1)
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


def by_onnxruntime(path: Path, feeds: Feeds) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns that it copies the cache
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def by_reference(path: Path, feeds: Feeds) -> list[Any]:
    return ReferenceEvaluator(onnx.load(path)).run(None, feeds)


def teacher_forced_logits(bundle: Path, dialect: str, run: Run) -> np.ndarray:
    """Logits [32, vocab] of fixed tokens by the full_pass graph: cyclical gates, tau 3, in two windows."""
    manifest = read_manifest(bundle)
    [graph] = [g for g in manifest["graphs"] if (g["name"], g["dialect"], g["slots"]) == ("full_pass", dialect, 1)]
    ids = np.random.default_rng(5).integers(0, manifest["model"]["vocab_size"], CUTS[-1][1])
    kind = DTYPES[manifest["model"]["dtype"]]
    caches = {
        item["name"]: np.zeros(
            [CAPACITY if dim == "capacity" else 1 if dim == "batch" else dim for dim in item["dims"]], kind
        )
        for item in graph["inputs"]
        if item["name"].startswith("past_key_values.")
    }
    logits = []
    for start, stop in CUTS:
        feeds = {item["name"]: _value(item, ids, start, stop, caches) for item in graph["inputs"]}
        outputs = run(bundle / graph["file"], feeds)
        named = {item["name"]: np.asarray(value) for item, value in zip(graph["outputs"], outputs, strict=True)}
        assert named["logits"].dtype == np.float32
        logits.append(named["logits"].reshape(stop - start, -1))
        caches = {name: named[name.replace("past_key_values.", "present.")] for name in caches}
    return np.concatenate(logits)


def _value(item: Mapping[str, Any], ids: np.ndarray, start: int, stop: int, caches: Feeds) -> np.ndarray:
    name, rows, positions = item["name"], stop - start, np.arange(start, stop)
    if name in caches:
        return caches[name]
    return {
        "input_ids": lambda: ids[None, start:stop],
        "position_ids": lambda: positions[None],
        "thinking_write_indices": lambda: np.array([start]),
        "late_write_indices": lambda: np.array([start]),
        "thinking_seqlens_k": lambda: np.array([stop - 1], np.int32),
        "late_seqlens_k": lambda: np.array([stop - 1], np.int32),
        "thinking_total_sequence_length": lambda: np.array([stop], np.int32),
        "late_total_sequence_length": lambda: np.array([stop], np.int32),
        "late_rows": lambda: np.arange(rows)[None],
        "logit_rows": lambda: np.arange(rows).reshape([1, rows] if len(item["dims"]) == 2 else [rows]),
        "gate_hidden": lambda: np.ones((1, rows), bool),
        "gate_thought": lambda: (positions % 3 == 0)[None],
    }[name]()


def assert_close(half: np.ndarray, full: np.ndarray, dtype: str) -> None:
    """Within MARGIN_ULP, and the same top token but for near-ties."""
    assert np.isfinite(half).all()
    ulp = 2.0 ** (np.floor(np.log2(np.abs(full).max())) - MANTISSA_BITS[dtype])
    worst = float(np.abs(half - full).max() / ulp)
    other = half.argmax(1) != full.argmax(1)
    print(f"measured: {worst:.2f} ULP, top-1 equal in {int((~other).sum())} of {len(other)}")  # shown by pytest -rP
    assert worst <= MARGIN_ULP
    top_two = np.sort(full, axis=1)[:, -2:]
    assert (top_two[other, 1] - top_two[other, 0] <= 2 * MARGIN_ULP * ulp).all()
    assert 1 - other.mean() >= TOP1_EQUAL[dtype]
    assert worst > 0.05, "equal to float32: was it computed in half at all?"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(half, float32) bundles of one checkpoint whose weights are stored in the half type."""

    @functools.cache
    def made(case: int, seed: int, dtype: str, layers: int = 6) -> tuple[Path, Path]:
        family, options = CASES[case]
        place = tmp_path_factory.mktemp("half")
        source = write_tiny_checkpoint(place / "m", family=family, seed=seed, dtype=dtype, layers=layers, **options)
        export(source, place / "half", dtype=dtype)
        export(source, place / "full")
        return place / "half", place / "full"

    return made


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", RUN, ids=CASE_IDS[:-1])
@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
def test_float16_in_onnxruntime(case: int, seed: int, dialect: str, bundles: Callable) -> None:
    half, full = bundles(case, seed, "float16")
    expected = teacher_forced_logits(full, dialect, by_onnxruntime)
    assert_close(teacher_forced_logits(half, dialect, by_onnxruntime), expected, "float16")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", RUN, ids=CASE_IDS[:-1])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_in_the_reference_evaluator(case: int, seed: int, dtype: str, bundles: Callable) -> None:
    half, full = bundles(case, seed, dtype)
    expected = teacher_forced_logits(full, "standard", by_onnxruntime)
    assert_close(teacher_forced_logits(half, "standard", by_reference), expected, dtype)


@pytest.mark.parametrize("case", RUN, ids=CASE_IDS[:-1])
def test_reference_evaluator_and_onnxruntime_agree_in_float32(case: int, bundles: Callable) -> None:
    _, full = bundles(case, 0, "float16")
    expected = teacher_forced_logits(full, "standard", by_onnxruntime)
    got = teacher_forced_logits(full, "standard", by_reference)
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
def test_norms_survive_rows_whose_squares_overflow_a_half(dialect: str, tmp_path: Path) -> None:
    """Residuals of some 1000: their squares are beyond 65504, so a norm summed in half gives zeros."""
    source = write_tiny_checkpoint(tmp_path / "m", dtype="float16", layers=6)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * np.float16(1000)
    assert 500 < np.abs(tensors["model.embed_tokens.weight"]).max() < 2000
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export(source, tmp_path / "half", dtype="float16")
    export(source, tmp_path / "full")
    expected = teacher_forced_logits(tmp_path / "full", dialect, by_onnxruntime)
    got = teacher_forced_logits(tmp_path / "half", dialect, by_onnxruntime)
    assert_close(got, expected, "float16")


@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
@pytest.mark.parametrize("full_pass", ["staged", "fused"])
def test_a_float16_bundle_generates(dialect: str, full_pass: str, bundles: Callable) -> None:
    """Every way to run it works; that its logits are right is what the tests above say."""
    half, _ = bundles(0, 0, "float16")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(half, dialect=dialect, full_pass=full_pass, threads=1) as llm:
        [output] = llm.generate([list(range(3, 12))], params)
    told = output.outputs[0]
    assert len(told.token_ids) == 12
    assert all(0 <= token < 128 for token in told.token_ids)


# What is float32 inside, read from the graphs.

FILES = [("standard", f"{name}.onnx") for name in ("full_pass", "thinking", "late_decode")] + [
    ("onnxruntime", f"{name}.ort.onnx") for name in ("full_pass", "thinking", "late_decode")
]


class Wires:
    """Who makes and who reads each value of a graph, and the types of its initializers."""

    def __init__(self, path: Path) -> None:
        self.graph = onnx.load(path, load_external_data=False).graph
        self.maker = {output: node for node in self.graph.node for output in node.output}
        self.types = {tensor.name: tensor.data_type for tensor in self.graph.initializer}
        self.types |= {value.name: value.type.tensor_type.elem_type for value in self.graph.output}

    def nodes(self, op: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type == op]

    def readers(self, value: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if value in node.input]

    def is_cast(self, node: onnx.NodeProto, to: int) -> bool:
        return node.op_type == "Cast" and attribute(node, "to") == to


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def half(request: pytest.FixtureRequest, bundles: Callable) -> tuple[Path, str]:
    return bundles(1, 0, request.param)[0], request.param


@pytest.mark.parametrize("name", ["full_pass", "thinking", "late_decode"])
def test_standard_norms_are_cast_to_float32_and_back(half: tuple[Path, str], name: str) -> None:
    bundle, dtype = half
    wires = Wires(bundle / f"{name}.onnx")
    norms = wires.nodes("RMSNormalization")
    layers = {"full_pass": 6, "thinking": 5, "late_decode": 1}[name]  # Qwen3: two norms, and one each for q and k
    assert len(norms) == 4 * layers + (name != "thinking")
    for norm in norms:
        assert wires.is_cast(wires.maker[norm.input[0]], FLOAT), norm.name
        [reader] = wires.readers(norm.output[0])
        assert wires.is_cast(reader, HALF[dtype]), norm.name
        [scaled] = wires.readers(reader.output[0])
        assert scaled.op_type == "Mul" and wires.types[scaled.input[1]] == HALF[dtype]


@pytest.mark.parametrize("name", ["full_pass", "thinking", "late_decode"])
def test_rms_sums_are_float32_and_attention_has_no_attribute_that_tensorrt_refuses(
    half: tuple[Path, str], name: str
) -> None:
    bundle, _ = half
    standard = Wires(bundle / f"{name}.onnx").nodes("Attention")
    layers = {"full_pass": 6, "thinking": 5, "late_decode": 1}[name]
    assert [[(a.name, a.f) for a in node.attribute] for node in standard] == [[("scale", 1.0)]] * layers
    own = Wires(bundle / f"{name}.ort.onnx")
    assert all(attribute(node, "stash_type") in (None, FLOAT) for node in own.nodes("RMSNormalization"))
    assert len(own.nodes("GroupQueryAttention")) == layers


@pytest.mark.parametrize("case", [1, 2, 4, 5], ids=[CASE_IDS[case] for case in (1, 2, 4, 5)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_queries_are_scaled_once_in_float32_or_by_a_power_of_two(case: int, dtype: str, bundles: Callable) -> None:
    """A factor that is rounded to the half type would make every logit of attention wrong by the same share."""
    options = CASES[case][1]
    bundle, full = bundles(case, 0, dtype)
    for directory, kind in ((bundle, dtype), (full, "float32")):
        wires = Wires(directory / "full_pass.onnx")
        constants = {t.name: t for t in wires.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
        for attention in wires.nodes("Attention"):
            found, value = [], attention.input[0]
            while value in wires.maker and (node := wires.maker[value]).op_type != "Gemm":
                factor = node.input[1] if len(node.input) > 1 else ""
                if factor in wires.maker and wires.maker[factor].op_type == "Expand":
                    factor = wires.maker[factor].input[0]
                if node.op_type in ("Mul", "RMSNormalization") and factor in constants:
                    found.append(constants[factor])
                value = node.input[0]
            [factor] = found
            number = float(np.asarray(onnx.numpy_helper.to_array(factor), np.float64).item())
            head_dim = options.get("head_dim", 16)
            assert number == float(np.float32(head_dim**-0.5))
            assert factor.data_type == FLOAT or (head_dim == 16 and factor.data_type == HALF[kind])
            for cached in attention.input[1:3]:
                assert wires.maker[cached].op_type == "TensorScatter"


@pytest.mark.parametrize("name", ["full_pass.onnx", "late_decode.onnx", "full_pass.ort.onnx", "late_decode.ort.onnx"])
def test_head_multiplies_in_half_and_its_product_is_cast(half: tuple[Path, str], name: str) -> None:
    bundle, dtype = half
    wires = Wires(bundle / name)
    [head] = [node for node in wires.nodes("Gemm") if node.name == "/lm_head/Gemm"]
    assert wires.types[head.input[1]] == HALF[dtype]
    [cast] = wires.readers(head.output[0])
    assert wires.is_cast(cast, FLOAT)
    [shaped] = wires.readers(cast.output[0])
    assert list(shaped.output) == ["logits"] and wires.types["logits"] == FLOAT


@pytest.mark.parametrize(("dialect", "file"), FILES)
def test_weights_and_caches_are_half_and_float32_graphs_have_no_casts(
    half: tuple[Path, str], dialect: str, file: str, bundles: Callable
) -> None:
    bundle, dtype = half
    graph = Wires(bundle / file).graph
    stored = {t.data_type for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert stored == {HALF[dtype]}
    caches = [v for v in graph.input if v.name.startswith("past_key_values.")]
    assert caches and {value.type.tensor_type.elem_type for value in caches} == {HALF[dtype]}
    _, full = bundles(1, 0, dtype)
    assert not Wires(full / file).nodes("Cast")
