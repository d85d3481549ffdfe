"""int8-channel: products of whole numbers against numpy, whole bundles against the oracle, and what is spoiled is caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_mutations import edit_weight, edited_graph, nodes_of, reseal
from onnx import numpy_helper

from dmtd_export.bundle.export import export_bundle
from dmtd_export.bundle.rounding import CHANNEL_STEPS, input_factors, rounded_by_channel
from dmtd_export.engines.plan import BuildOptions, plan_build
from dmtd_export.errors import ExportError
from dmtd_export.graphs.linear import channel_product
from dmtd_export.graphs.writer import GraphWriter
from dmtd_export.options import ExportOptions, WeightOptions, check_options
from dmtd_export.verify import verify_bundle
from dmtd_export.verify.stored import stored_weight
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import WeightInfo, load_manifest
from dmtd_runtime.ort.library import import_onnxruntime

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = (1, 2, 3, 4, 5, 8, 23, 64, 512)
WEIGHT = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, bundle): E1 T2 D1 with biases; T and D in int8-channel, a tied table in int8."""
    place = tmp_path_factory.mktemp("channels")
    checkpoint = write_tiny_checkpoint(place / "model", layers=4, tokenizer=True, family="qwen2", tie=True)
    text = place / "text.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "its", "tail", "again;"]
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(40)) + "\n")
    options = ExportOptions(
        split=SplitOptions(encoding_layers=1, decoding_layers=1, cycle_length=2),
        max_num_seqs=2,
        max_model_len=64,
        formats=WeightOptions(weights="int8-channel"),
        calibration=(str(text),),
    )
    export_bundle(checkpoint, place / "bundle", options)
    return checkpoint, place / "bundle"


@pytest.fixture
def bundle(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "bundle"))


class Product:
    """One product over ``weight`` as graphs write it, its stored parts in a file."""

    def __init__(self, place: Path, weight: np.ndarray, sizes: np.ndarray) -> None:
        self.stored = rounded_by_channel(weight, input_factors([weight], sizes))
        outputs, inputs = weight.shape
        parts = {
            "w.codes": self.stored.codes.reshape(outputs, 1, inputs),
            "w.scales": self.stored.scales,
            "w.factors": self.stored.factors,
        }
        infos, file = dict[str, WeightInfo](), (place / "model.onnx.data").open("wb")
        with file:
            for name, array in parts.items():
                start = file.tell()
                file.write(array.tobytes())
                infos[name] = WeightInfo(
                    dtype=str(array.dtype), shape=array.shape, offset=start, length=array.nbytes, norm=0.0, probe=0.0
                )
        writer = GraphWriter("product", infos)
        x = writer.input("x", ["rows", inputs], "float32")
        x = writer.op("Mul", [x, writer.weight("w.factors")], "/x")
        y = channel_product(writer, "float32", x, ("w",), "/w")
        writer.op("Identity", [y], "/y", output=writer.output("y", ["rows", outputs], "float32"))
        onnx.save_model(writer.finish("0", "a product"), place / "product.onnx")
        self._session = import_onnxruntime().InferenceSession(
            str(place / "product.onnx"), providers=["CPUExecutionProvider"]
        )

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self._session.run(None, {"x": x})[0]

    def expected(self, x: np.ndarray) -> np.ndarray:
        """In numpy, sums of whole numbers in int64."""
        scaled, step = x * self.stored.factors, np.float32(1 / 127)
        largest = np.abs(scaled).max(-1, keepdims=True)
        whole = np.rint(scaled / largest / step).astype(np.int64)
        sums = whole @ (self.stored.codes.astype(np.int64) - 128).T
        return sums.astype(np.float32) * (self.stored.scales[:, 0] * step) * largest


@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_exact_and_each_rows_own(tmp_path: Path, rows: int) -> None:
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((48, 160)).astype(np.float32)
    sizes = np.exp(rng.standard_normal(160)).astype(np.float32)
    product = Product(tmp_path, weight, sizes)
    x = (rng.standard_normal((rows, 160)) * sizes).astype(np.float32)
    x[rows // 2, :5] = 0
    got = product(x)
    np.testing.assert_allclose(got, product.expected(x), rtol=1e-6, atol=1e-6 * np.abs(got).max())
    for row in {0, rows // 2, rows - 1}:
        assert np.array_equal(product(x[row : row + 1])[0], got[row]), "a neighbour changes a row"
    # The weight itself, within half a step of inputs and of weights.
    assert np.abs(got - x @ weight.T).max() < 0.03 * np.abs(got).max()


def test_the_largest_numbers_do_not_overflow(tmp_path: Path) -> None:
    """Inputs and weights all at their ends: what adds two products in 16 bits still holds them."""
    weight = np.ones((16, 128), np.float32)
    product = Product(tmp_path, weight, np.ones(128, np.float32))
    assert set(np.unique(product.stored.codes)) == {128 + CHANNEL_STEPS}
    x = np.stack([np.ones(128), -np.ones(128)]).astype(np.float32)
    np.testing.assert_allclose(product(x), x @ weight.T, rtol=1e-6)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_row(tmp_path: Path) -> None:
    """As in a product over blocks, a NaN does not show here: it does in the residual stream, past which nothing goes."""
    product = Product(tmp_path, np.eye(32, dtype=np.float32), np.ones(32, np.float32))
    x = np.ones((4, 32), np.float32)
    x[0], x[1, 7], x[2, 9] = 0, np.inf, np.nan
    got = product(x)
    assert np.array_equal(got[0], np.zeros(32)) and not np.isfinite(got[1]).all()
    assert np.array_equal(got[3], product(x[3:])[0])


def test_factors_level_inputs_and_weights() -> None:
    rng = np.random.default_rng(1)
    weight, sizes = rng.standard_normal((32, 64)).astype(np.float32), np.ones(64, np.float32)
    sizes[3], weight[:, 5], sizes[9] = 100.0, 0.0, 0.0
    factors = input_factors([weight, 2 * weight], sizes)
    assert factors[5] == factors[9] == 1.0 and (factors > 0).all()
    kept = np.ones(64, bool)
    kept[[5, 9]] = False
    np.testing.assert_allclose(
        (sizes * factors)[kept], (2 * np.abs(weight).max(0) / np.where(factors > 0, factors, 1))[kept], rtol=1e-5
    )
    made = rounded_by_channel(weight, factors)
    assert np.abs(made.codes.astype(int) - 128).max() == CHANNEL_STEPS
    steps = np.abs(made.dequantised() - weight) / (made.scales * factors)
    assert steps.max() <= 0.5 + 1e-4
    # An input that is a hundred times as large as the others would leave them few steps of a row's scale.
    x = (rng.standard_normal((64, 64)) * sizes).astype(np.float32)

    def lost(factors: np.ndarray) -> float:
        scaled = x * factors
        scale = np.abs(scaled).max(-1, keepdims=True) / 127
        values = np.rint(scaled / scale) * scale / factors
        return float(np.square((values - x) @ weight.T).sum())

    assert lost(factors) < 0.3 * lost(np.ones(64, np.float32))


def test_a_bundle_passes_at_the_highest_level(made: tuple[Path, Path]) -> None:
    checkpoint, bundle = made
    manifest = load_manifest(bundle)
    kinds = {name: fmt.name for name, fmt in manifest.quantised.items()}
    assert kinds.pop("model.embed_tokens.weight") == "int8 in blocks of 32" and set(kinds.values()) == {
        "int8-channel, calibrated"
    }
    assert manifest.calibration.keys() == {"weights"} and manifest.schema == 3
    with open_checkpoint(checkpoint) as source:
        report = verify_bundle(bundle, checkpoint=source, quick=True)
    assert report.ok, report.first_divergence
    assert report.level == "oracle"
    exact = [check for check in report.checks if "inputs not rounded" in check.name]
    as_is = [check for check in report.checks if "as it is" in check.name]
    assert {check.margin for check in exact} == {2e-5} and len(exact) >= 4
    assert max(check.worst or 0.0 for check in as_is) > 1e-3, "inputs were rounded"


def test_inputs_share_their_factors(made: tuple[Path, Path]) -> None:
    manifest, data = load_manifest(made[1]), (made[1] / "model.onnx.data").read_bytes()

    def part(name: str) -> bytes:
        info = manifest.weights[name]
        return data[info.offset : info.offset + info.length]

    q, k, v = (part(f"model.layers.1.self_attn.{kind}_proj.factors") for kind in "qkv")
    assert q == k == v != part("model.layers.2.self_attn.q_proj.factors")


# --- what is spoiled is caught -------------------------------------------------------------------------------------


def swap(tensor: np.ndarray) -> None:
    tensor[[0, 1]] = tensor[[1, 0]]


def double(tensor: np.ndarray) -> None:
    tensor[3] = tensor[3] * 2


def turn(tensor: np.ndarray) -> None:
    tensor[2, 0, :8] ^= 0x10


@pytest.mark.parametrize(("part", "edit"), [("scales", swap), ("factors", swap), ("factors", double), ("codes", turn)])
@pytest.mark.parametrize("known", ["numbers", "checkpoint"])
def test_an_altered_part_is_named(made: tuple[Path, Path], bundle: Path, part: str, edit: Callable, known: str) -> None:
    edit_weight(bundle, f"{WEIGHT}.{part}", edit, refingerprint=known == "checkpoint")
    reseal(bundle)
    with open_checkpoint(made[0]) as source:
        report = verify_bundle(bundle, checkpoint=source if known == "checkpoint" else None, level="structure")
    first = report.first_divergence
    assert first is not None and (first.graph, first.layer) == ("model.onnx.data", 2) and WEIGHT in first.detail


def constant(model: onnx.ModelProto, name: str, value: float, dtype: str) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))


def other_middle(model: onnx.ModelProto) -> None:
    constant(model, "middle", 127, "uint8")
    nodes_of(model, "MatMulIntegerToFloat")[0].input[4] = "middle"


def other_bit(model: onnx.ModelProto) -> None:
    constant(model, "bit", 64, "uint8")
    nodes_of(model, "BitwiseXor")[0].input[1] = "bit"


def other_share(model: onnx.ModelProto) -> None:
    constant(model, "share", 1 / 64, "float32")
    nodes_of(model, "MatMulIntegerToFloat")[0].input[2] = "share"


def other_step(model: onnx.ModelProto) -> None:
    constant(model, "step", 1 / 64, "float32")
    nodes_of(model, "QuantizeLinear")[0].input[1] = "step"


def other_factors(model: onnx.ModelProto) -> None:
    """Of an attention's outputs, those of another layer."""
    first, second, *_ = (node for node in nodes_of(model, "Mul") if node.name.endswith("o_proj/inputs/Mul"))
    first.input[1] = second.input[1]


def other_factors_of_a_norm(model: onnx.ModelProto) -> None:
    """In a norm's weight, those of another layer."""
    first, second, *_ = (
        node for node in nodes_of(model, "Mul") if node.name.endswith("input_layernorm.weight/factors/Mul")
    )
    first.input[1] = second.input[1]


def no_middle(model: onnx.ModelProto) -> None:
    """Inputs are read about 0."""
    del nodes_of(model, "MatMulIntegerToFloat")[0].input[4]


def read_twice(model: onnx.ModelProto) -> None:
    """A second reader, which changes nothing, of a product whose row's scale is left out."""
    no_row_scale(model)
    product = nodes_of(model, "MatMulIntegerToFloat")[0]
    model.graph.node.append(onnx.helper.make_node("Identity", [product.output[0]], ["read_twice"]))


def no_row_scale(model: onnx.ModelProto) -> None:
    constant(model, "one", 1.0, "float32")
    product = nodes_of(model, "MatMulIntegerToFloat")[0]
    next(node for node in nodes_of(model, "Mul") if node.input[0] == product.output[0]).input[1] = "one"


@pytest.mark.parametrize(
    "spoil",
    [
        other_middle,
        other_bit,
        other_share,
        other_step,
        other_factors,
        other_factors_of_a_norm,
        no_row_scale,
        no_middle,
        read_twice,
    ],
)
def test_a_spoiled_graph_is_found(bundle: Path, spoil: Callable[[onnx.ModelProto], None]) -> None:
    with edited_graph(bundle, "thinking.ort.onnx") as model:
        spoil(model)
    reseal(bundle)
    report = verify_bundle(bundle, quick=True)
    assert not report.ok and report.first_divergence is not None
    assert report.first_divergence.graph.startswith("thinking.ort.onnx"), report.first_divergence


@pytest.mark.parametrize("spoil", [other_middle, other_share, other_step, no_row_scale])
def test_a_spoiled_branch_is_found(bundle: Path, spoil: Callable[[onnx.ModelProto], None]) -> None:
    with edited_graph(bundle, "cycle.ort.onnx") as model:
        spoil(model)
    reseal(bundle)
    failed = [check for check in verify_bundle(bundle, quick=True).checks if not check.ok]
    assert all("one graph" in check.name or "in one go" in check.name for check in failed)
    assert 2e-5 in [check.margin for check in failed], "inputs that are not rounded tell"


def test_the_oracles_reading_is_the_formula(made: tuple[Path, Path]) -> None:
    bundle, manifest = made[1], load_manifest(made[1])
    data = (bundle / "model.onnx.data").read_bytes()
    raw = [
        data[i.offset : i.offset + i.length]
        for i in (manifest.weights[p] for p in manifest.parts_of(f"{WEIGHT}.weight"))
    ]
    shape = manifest.shape_of(f"{WEIGHT}.weight")
    codes = np.frombuffer(raw[0], np.uint8).reshape(shape).astype(np.float64) - 128
    scales = np.frombuffer(raw[1], np.float16 if len(raw[1]) == 2 * shape[0] else np.float32).astype(np.float64)
    expected = codes * scales[:, None] * np.frombuffer(raw[2], np.float32)
    np.testing.assert_allclose(stored_weight(bundle, manifest, f"{WEIGHT}.weight"), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExportOptions(formats=WeightOptions(weights_thinking="int8-channel")), "weights_thinking.*no text"),
        (
            ExportOptions(
                formats=WeightOptions(weights="int8-channel", weights_embedding="int8-channel"), calibration=("a",)
            ),
            "weights_embedding.*looked up in blocks",
        ),
        (
            ExportOptions(formats=WeightOptions(weights="int8-channel"), calibration=("a",), target="all"),
            "weights.*--target all, expected onnxruntime",
        ),
        (
            ExportOptions(formats=WeightOptions(weights="int8-channel"), calibration=("a",), dtype="bfloat16"),
            "expected float32",
        ),
    ],
)
def test_where_it_cannot_be_it_is_refused(options: ExportOptions, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        check_options(options)


def test_no_engine_takes_it(made: tuple[Path, Path]) -> None:
    with pytest.raises(ExportError, match=r"weights in int8-channel, which no engine takes; export it with others"):
        plan_build(load_manifest(made[1]), BuildOptions(backend="simulator"))
