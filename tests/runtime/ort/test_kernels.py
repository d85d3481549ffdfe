"""The products of ``dmtd_runtime/ort/kernels``, in real sessions, against the operator's definition in float64."""

from __future__ import annotations

import ctypes
import gc
import itertools
import platform
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dmtd_export.graphs.linear import offset_product
from dmtd_export.graphs.writer import OWN_DOMAIN
from dmtd_runtime.ort.kernels import library as kernels
from dmtd_runtime.ort.library import import_onnxruntime

HERE = (sys.platform, platform.machine()) == ("linux", "x86_64")
pytestmark = pytest.mark.skipif(not HERE, reason="the kernels are for Linux on x86-64")
SETS = kernels.SETS
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 23, 64)
CLOSE = 2e-6  # of the largest sum: float32, in another order


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Sessions compute with these instructions within the test."""
    choose = ctypes.CDLL(str(kernels.LIBRARY)).dmtd_kernels_choose
    choose.restype = ctypes.c_char_p
    if choose(request.param.encode()).decode() != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    choose(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A MatMulNBits node's constants and shape."""

    outputs: int
    inputs: int
    bits: int
    block: int
    codes: np.ndarray  # uint8 [outputs, inputs], one a byte
    scales: np.ndarray  # float32 [outputs, blocks]
    zeros: np.ndarray | None = None  # uint8 [outputs, blocks]
    bias: np.ndarray | None = None
    offsets: np.ndarray | None = None  # float32 [outputs, blocks]

    def attrs(self, **other: int) -> dict[str, int]:
        shape = {"N": self.outputs, "K": self.inputs, "bits": self.bits, "block_size": self.block}
        return {**shape, "accuracy_level": 4, **other}

    def initializers(self) -> list[onnx.TensorProto]:
        stored = {"codes": packed(self.codes, self.bits).reshape(*self.scales.shape, -1), "scales": self.scales}
        if self.zeros is not None:
            stored["zeros"] = packed(self.zeros, self.bits)
        if self.offsets is not None:
            stored["offsets"] = self.offsets
        if self.bias is not None:
            stored["bias"] = self.bias
        return [numpy_helper.from_array(value, name) for name, value in stored.items()]

    def node(self, **attrs: int) -> onnx.NodeProto:
        moved = "zeros" if self.zeros is not None else "offsets" if self.offsets is not None else ""
        names = ["x", "codes", "scales", moved, "", "bias" if self.bias is not None else ""]
        while not names[-1]:
            names.pop()
        domain = "com.microsoft" if self.offsets is None else OWN_DOMAIN
        return helper.make_node("MatMulNBits", names, ["y"], domain=domain, **self.attrs(**attrs))

    def model(self, **attrs: int) -> onnx.ModelProto:
        return graph_of([self.node(**attrs)], self.initializers(), self.inputs)

    def weights(self) -> np.ndarray:
        zeros = np.full(self.scales.shape, 1 << self.bits - 1) if self.zeros is None else self.zeros
        steps = self.codes.reshape(*self.scales.shape, self.block).astype(np.float64) - zeros[..., None]
        return (steps * self.scales[..., None]).reshape(self.outputs, self.inputs)

    def added(self, x: np.ndarray) -> np.ndarray:
        """What offsets and bias give, of inputs that are not rounded."""
        offsets = np.zeros((self.outputs, 1)) if self.offsets is None else self.offsets.astype(np.float64)
        sums = x.astype(np.float64).reshape(len(x), offsets.shape[1], -1).sum(-1)
        return sums @ offsets.T + (0 if self.bias is None else self.bias)

    def result(self, x: np.ndarray) -> np.ndarray:
        """``x`` [rows, inputs] rounded to int8 in blocks, times the weights, in float64."""
        blocks = x.reshape(len(x), -1, self.block)
        scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.where(scales, np.rint(blocks * (np.float32(1) / scales)), 0)
        rounded = (codes.astype(np.float64) * scales).reshape(x.shape)
        return rounded @ self.weights().T + self.added(x)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as they are stored: those of 4 bits two a byte, the lower half first."""
    if bits == 8:
        return codes
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (padded[:, ::2] | padded[:, 1::2] << 4).astype(np.uint8)


def graph_of(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], inputs: int) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", inputs])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid(OWN_DOMAIN, 1)]
    graph = helper.make_graph(nodes, "product", [x], [y], initializers)
    return helper.make_model(graph, functions=[offset_product()], opset_imports=opsets, ir_version=10)


def session_of(model: onnx.ModelProto, *, own: bool = True) -> Any:
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 2
    settings.log_severity_level = 4
    if own:
        settings.register_custom_ops_library(str(kernels.LIBRARY))
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def product_of(
    bits: int,
    block: int,
    outputs: int,
    blocks: int,
    *,
    zeros: bool = False,
    offsets: bool = False,
    bias: bool = False,
    half: bool = True,
) -> Product:
    rng = np.random.default_rng(outputs + block)
    scales = rng.standard_normal((outputs, blocks)).astype(np.float16 if half else np.float32).astype(np.float32)
    return Product(
        outputs=outputs,
        inputs=blocks * block,
        bits=bits,
        block=block,
        codes=rng.integers(0, 1 << bits, (outputs, blocks * block)).astype(np.uint8),
        scales=scales,
        zeros=rng.integers(0, 1 << bits, (outputs, blocks)).astype(np.uint8) if zeros else None,
        bias=rng.standard_normal(outputs).astype(np.float32) if bias else None,
        offsets=rng.standard_normal((outputs, blocks)).astype(np.float32) if offsets else None,
    )


SHAPES = [
    *({"bits": bits, "block": block, "outputs": 48, "blocks": 5} for bits in (4, 8) for block in (16, 32, 64, 128)),
    *(
        {"bits": bits, "block": 32, "outputs": outputs, "blocks": 3}
        for bits in (4, 8)
        for outputs in (1, 7, 16, 17, 200)
    ),
    *({"bits": bits, "block": 32, "outputs": 33, "blocks": 5, "zeros": True} for bits in (4, 8)),
    *(
        {"bits": bits, "block": 64, "outputs": 40, "blocks": 2, "bias": True, "half": half}
        for bits in (4, 8)
        for half in (True, False)
    ),
    {"bits": 4, "block": 16, "outputs": 19, "blocks": 7, "zeros": True, "bias": True, "half": False},
    {"bits": 4, "block": 32, "outputs": 3000, "blocks": 40},
    *(
        {"bits": bits, "block": block, "outputs": 33, "blocks": 5, "offsets": True}
        for bits in (4, 8)
        for block in (16, 64)
    ),
    {"bits": 4, "block": 32, "outputs": 100, "blocks": 9, "offsets": True, "bias": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_what_the_operator_means(shape: dict[str, Any], instructions: str) -> None:
    product = product_of(**shape)
    session, rng = session_of(product.model()), np.random.default_rng(3)
    for rows in ROWS:
        x = rng.standard_normal((rows, product.inputs)).astype(np.float32) * rng.choice([1e-3, 1, 1e3], (rows, 1))
        x = x.astype(np.float32)
        (y,) = session.run(None, {"x": x})
        wanted = product.result(x)
        terms = np.abs(product.weights()) + (0 if product.offsets is None else np.abs(product.offsets).max())
        room = CLOSE * (np.abs(x) @ terms.T).max(1, keepdims=True) + 1e-6
        assert (np.abs(y - wanted) <= room).all(), rows


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_and_inputs_overflow_nothing(bits: int, instructions: str) -> None:
    product = product_of(bits, 128, 16, 6)
    product.codes[:] = (1 << bits) - 1
    for sign in (1, -1):
        x = np.full((4, product.inputs), sign, np.float32)
        (y,) = session_of(product.model()).run(None, {"x": x})
        np.testing.assert_allclose(y, product.result(x), rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_a_row_is_the_same_bits_in_any_company_and_with_any_instructions(bits: int, block: int) -> None:
    product = product_of(bits, block, 80, 6, zeros=True, bias=True)
    choose = ctypes.CDLL(str(kernels.LIBRARY)).dmtd_kernels_choose
    choose.restype = ctypes.c_char_p
    session, rng = session_of(product.model()), np.random.default_rng(5)
    x = rng.standard_normal((max(ROWS), product.inputs)).astype(np.float32)
    x[1:] *= 1e6  # were rows rounded together, nothing of the first would be left
    try:
        choose(b"avx2")
        (alone,) = session.run(None, {"x": x[:1]})
        for most, rows in itertools.product((b"avx2", b""), ROWS):
            choose(most)
            (together,) = session.run(None, {"x": x[:rows]})
            (moved,) = session.run(None, {"x": np.roll(x[:rows], rows - 1, 0)})
            assert (together[0] == alone[0]).all() and (moved[-1] == alone[0]).all(), (most, rows)
    finally:
        choose(b"")


def test_it_is_close_to_onnxruntimes_own(instructions: str) -> None:
    """Which takes a product with offsets apart, as its function says."""
    for bits, offsets, bias in itertools.product((4, 8), (False, True), (False, True)):
        product = product_of(bits, 32, 96, 18, offsets=offsets, bias=bias)
        x = np.random.default_rng(0).standard_normal((5, product.inputs)).astype(np.float32)
        own, theirs = (session_of(product.model(), own=own).run(None, {"x": x})[0] for own in (True, False))
        assert np.abs(own - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_what_is_no_number_shows_and_zeros_are_zeros(instructions: str) -> None:
    product = product_of(4, 32, 32, 4)
    session = session_of(product.model())
    for value in (np.nan, np.inf, -np.inf):
        x = np.ones((3, product.inputs), np.float32)
        x[1, 40] = value
        (y,) = session.run(None, {"x": x})
        assert not np.isfinite(y[1]).any() and np.isfinite(y[[0, 2]]).all(), value
    (y,) = session.run(None, {"x": np.zeros((3, product.inputs), np.float32)})
    assert (y == 0).all()
    assert session.run(None, {"x": np.zeros((0, product.inputs), np.float32)})[0].shape == (0, 32)


def test_shapes_are_known_before_a_run() -> None:
    """ONNX Runtime plans memory by them: by a dimension's name, or its number."""
    product = product_of(4, 32, 48, 2)
    assert session_of(product.model()).get_outputs()[0].shape == ["rows", 48]


def test_weights_are_shared_in_branches_and_outlive_other_sessions() -> None:
    product = product_of(4, 32, 64, 4)
    made = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("a", "b")]
    read = ["x", "codes", "scales"]
    first, second = (
        helper.make_graph(
            [helper.make_node("MatMulNBits", read, [info.name], domain="com.microsoft", **product.attrs())],
            info.name,
            [],
            [info],
        )
        for info in made
    )
    shape = helper.make_node("Size", ["x"], ["size"])
    greater = helper.make_node("Greater", ["size", "limit"], ["more"])
    choice = helper.make_node("If", ["more"], ["y"], then_branch=first, else_branch=second)
    limit = numpy_helper.from_array(np.array(product.inputs), "limit")
    model = graph_of([shape, greater, choice], [*product.initializers(), limit], product.inputs)
    x = np.random.default_rng(0).standard_normal((2, product.inputs)).astype(np.float32)
    sessions = [session_of(model) for _ in range(3)]
    wanted = product.result(x)
    while sessions:
        for rows in (1, 2):
            (y,) = sessions[-1].run(None, {"x": x[:rows]})
            np.testing.assert_allclose(y, wanted[:rows], rtol=1e-4, atol=1e-4)
        sessions.pop(0)


def packed_weights() -> int:
    gc.collect()  # sessions of other tests in cycles of references
    count = ctypes.CDLL(str(kernels.LIBRARY)).dmtd_kernels_packed
    count.restype = ctypes.c_size_t
    return int(count())


def test_equal_weights_are_packed_once_and_gone_with_their_last_session() -> None:
    """Other weights of the same shape are others, in whatever way they differ."""
    before = packed_weights()
    first = product_of(4, 32, 32, 4, bias=True)
    others = [replace(first, bias=first.bias + 1), replace(first, scales=first.scales * 2), replace(first, bias=None)]
    others.append(replace(first, codes=np.roll(first.codes, 1)))
    others.append(replace(first, offsets=first.scales))
    x = np.random.default_rng(0).standard_normal((2, first.inputs)).astype(np.float32)
    sessions = [session_of(product.model()) for product in (first, first, *others)]
    assert packed_weights() == before + 1 + len(others)
    for product, session in zip((first, first, *others), sessions, strict=True):
        np.testing.assert_allclose(session.run(None, {"x": x})[0], product.result(x), rtol=1e-3, atol=1e-3)
    del session
    sessions.clear()
    assert packed_weights() == before


def test_sessions_that_open_while_others_close_have_their_own_weights(tmp_path: Path) -> None:
    """ONNX Runtime gives a file's mapping back before the kernels, and the next one may come to lie where it was."""
    products = [replace(product_of(4, 32, 64, 4), scales=np.full((64, 4), 1.0 + i, np.float32)) for i in range(2)]
    x, faults = np.ones((1, products[0].inputs), np.float32), list[int]()
    for i, product in enumerate(products):
        place = {"save_as_external_data": True, "location": f"{i}.data", "size_threshold": 0}
        onnx.save(product.model(), tmp_path / f"{i}.onnx", **place)

    def work(mine: int) -> None:
        ort = import_onnxruntime()
        wanted = products[mine].result(x)
        for _ in range(40):
            settings = ort.SessionOptions()
            settings.intra_op_num_threads = 1
            settings.register_custom_ops_library(str(kernels.LIBRARY))
            session = ort.InferenceSession(tmp_path / f"{mine}.onnx", settings, providers=["CPUExecutionProvider"])
            if np.abs(session.run(None, {"x": x})[0] - wanted).max() > 1e-3 * np.abs(wanted).max():
                faults.append(mine)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


@pytest.mark.parametrize("dims", [(), (3,), (2, 3), (1, 2, 2)])
def test_inputs_of_any_rank(dims: tuple[int, ...]) -> None:
    product = product_of(4, 32, 48, 2, offsets=True)
    model = product.model()
    shape = model.graph.input[0].type.tensor_type.shape
    del shape.dim[:]
    for _ in dims:
        shape.dim.add()  # no name, no number
    shape.dim.add(dim_value=product.inputs)
    x = np.random.default_rng(0).standard_normal((*dims, product.inputs)).astype(np.float32)
    (y,) = session_of(model).run(None, {"x": x})
    assert y.shape == (*dims, 48)
    np.testing.assert_allclose(y.reshape(-1, 48), product.result(x.reshape(-1, product.inputs)), rtol=1e-3, atol=1e-3)


def test_tiny_inputs_are_zeros() -> None:
    product = product_of(8, 16, 16, 2)
    (y,) = session_of(product.model()).run(None, {"x": np.full((1, 32), 1e-38, np.float32)})
    assert np.abs(y).max() <= 1e-36


def test_inputs_of_another_width_are_an_error() -> None:
    product = product_of(4, 32, 32, 4)
    model = product.model()
    model.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    with pytest.raises(Exception, match="inputs are not K wide"):
        session_of(model).run(None, {"x": np.zeros((2, 64), np.float32)})


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"accuracy_level": 0}, "accuracy_level"),
        ({"bits": 2}, "bits, block_size, N or K"),
        ({"block_size": 24}, "bits, block_size, N or K"),
        ({"K": 100}, "bits, block_size, N or K"),
        ({"N": 31}, "has not the size"),
        ({"bits": 8}, "has not the size"),
    ],
)
def test_what_it_does_not_know_is_refused(attrs: dict[str, int], words: str) -> None:
    with pytest.raises(Exception, match=words):
        session_of(product_of(4, 32, 32, 4).model(**attrs))


@pytest.mark.parametrize("name", ["codes", "scales", "zeros", "offsets", "bias"])
def test_weights_that_are_computed_are_refused(name: str) -> None:
    product = product_of(4, 32, 32, 4, zeros=name == "zeros", offsets=name == "offsets", bias=True)
    model = product.model()
    [stored] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    model.graph.input.append(helper.make_tensor_value_info(name, stored.data_type, stored.dims))
    model.graph.initializer.remove(stored)
    with pytest.raises(Exception, match="no constants"):
        session_of(model)


def test_an_order_of_inputs_is_refused() -> None:
    product = product_of(4, 32, 32, 4, bias=True)
    model = product.model()
    model.graph.node[0].input[4] = "order"
    model.graph.initializer.append(numpy_helper.from_array(np.arange(product.inputs, dtype=np.int32), "order"))
    with pytest.raises(Exception, match="an order of its inputs"):
        session_of(model)
