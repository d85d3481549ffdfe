"""A linear layer over the weights as they are stored: one Gemm over floats, or a product over blocks of codes.

Modules whose weights stand one behind another (q, k, v; gate, up) are one product where their formats are equal. In blocks
(see ``BlockFormat``) a weight is ``scale * (code - middle) + offset``. In ONNX Runtime's own operators the codes are
MatMulNBits' with its own zero point; in standard ones the same bytes are a matrix of integers, DequantizeLinear's, blocked
along axis 1. Offsets, which only formats with minimums have, are a product over the sums of the inputs' blocks: MatMulNBits'
float zero points are exact as well and run a path 13 to 65 times slower. In float32 both products are one node, a function of
the file (``offset_product``) that ``dmtd_runtime/ort/kernels`` computes in one go. Where minimums are zero points (GPTQ, AWQ)
MatMulNBits takes those, and there is no second product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cache

from onnx import AttributeProto, FunctionProto, helper

from dmtd_export.graphs.writer import CONTRIB_DOMAIN, ONNX_DTYPES, OPSET, OWN_DOMAIN, GraphWriter
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import BlockFormat

# How the inputs of a product are rounded: 4, to int8 with a scale for each block of a row. 0 would be not at all.
ACCURACY_LEVEL = 4

Product = Callable[[str, tuple[str, ...], BlockFormat, str], str]


def linear(writer: GraphWriter, x: str, modules: tuple[str, ...], path: str, in_blocks: Product) -> str:
    """``x`` [..., in] times the stacked weights of ``modules`` (full module paths), with their biases if they have any.

    ``in_blocks`` is the dialect's product over quantised weights.
    """
    runs = [(fmt, tuple(run)) for fmt, run in itertools.groupby(modules, lambda m: writer.block_format(f"{m}.weight"))]
    made = []
    for fmt, run in runs:
        place = path if len(runs) == 1 else f"{path}/{run[0].rpartition('.')[2]}"
        if fmt is None:
            inputs = [x, writer.weight(*(f"{module}.weight" for module in run)), *biases(writer, run)]
            made.append(writer.op("Gemm", inputs, place, attrs={"transB": 1}))
        else:
            made.append(in_blocks(x, run, fmt, place))
    return made[0] if len(made) == 1 else writer.op("Concat", made, path, attrs={"axis": -1})


def biases(writer: GraphWriter, modules: tuple[str, ...]) -> list[str]:
    """The stacked biases of ``modules``, as an operator's last input."""
    return [writer.weight(*(f"{m}.bias" for m in modules))] if writer.has_weight(f"{modules[0]}.bias") else []


def takes_any_rank(writer: GraphWriter, dtype: str, modules: Iterable[str]) -> bool:
    """Whether the products of all ``modules`` take [..., in]. A Gemm, of floats or half-precision offsets, takes [rows, in]."""
    formats = [writer.block_format(f"{module}.weight") for module in modules]
    return all(fmt is not None and (fmt.zeros or not fmt.minimums or dtype == "float32") for fmt in formats)


def shared_factors(writer: GraphWriter, modules: tuple[str, ...]) -> str | None:
    """The factors [in] of the inputs of ``modules`` where these are one product of whole numbers; None where they are not."""
    formats = {writer.block_format(f"{module}.weight") for module in modules}
    fmt = formats.pop() if len(formats) == 1 else None
    return writer.weight(f"{modules[0]}.{contract.FACTORS}") if fmt is not None and fmt.factors else None


def nbits_product(
    writer: GraphWriter,
    dtype: str,
    x: str,
    modules: tuple[str, ...],
    fmt: BlockFormat,
    path: str,
    *,
    factored: bool = False,
) -> str:
    """The product in ONNX Runtime's own operators, whose sums over blocks are float32's inside in every type.

    On CUDA they are (``reduce_matrix_columns_kernel`` with its accumulator), and on the CPU, which has none in half precision,
    ONNX Runtime casts by itself. ``factored``: ``x`` has the factors of a product of whole numbers in it.
    """
    if (factors := shared_factors(writer, modules)) is not None:
        x = x if factored else writer.op("Mul", [x, factors], f"{path}/inputs")
        return channel_product(writer, dtype, x, modules, path)
    codes = writer.weight(*(f"{module}.{contract.CODES}" for module in modules))
    rows, blocks, _ = writer.dims(codes)
    bias = biases(writer, modules)
    shape = {"N": rows, "K": blocks * fmt.block, "bits": fmt.bits, "block_size": fmt.block}
    attrs = {**shape, "accuracy_level": ACCURACY_LEVEL}
    inputs = [x, codes, scales(writer, dtype, modules)]
    if fmt.minimums and not fmt.zeros and dtype == "float32":
        inputs += [offsets(writer, dtype, modules, fmt, path), *(["", *bias] if bias else [])]
        return writer.call(offset_product(), inputs, path, attrs)
    if fmt.zeros or bias:
        inputs += [zero_points(writer, modules, fmt, path) if fmt.zeros else "", *(["", *bias] if bias else [])]
    (product,) = writer.node("MatMulNBits", inputs, path, contrib=True, attrs=attrs)
    if fmt.zeros:
        return product
    return _with_offsets(writer, dtype, x, product, modules, fmt, path, casts=False)


@cache
def offset_product() -> FunctionProto:
    """MatMulNBits with offsets [out, blocks] in the place of zero points, added to the weights of their blocks."""
    attrs = ("N", "K", "bits", "block_size", "accuracy_level")
    product = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales", "", "", "bias"], ["unmoved"], domain=CONTRIB_DOMAIN
    )
    for name in attrs:
        product.attribute.add(name=name, type=AttributeProto.INT, ref_attr_name=name)
    block = helper.make_node("Constant", [], ["block"])
    block.attribute.add(name="value_int", type=AttributeProto.INT, ref_attr_name="block_size")
    nodes = [
        product,
        helper.make_node("Shape", ["x"], ["outer"], end=-1),
        helper.make_node("Shape", ["offsets"], ["blocks"], start=1),
        helper.make_node("Constant", [], ["last"], value_ints=[-1]),
        block,
        helper.make_node("Reshape", ["block", "last"], ["width"]),
        helper.make_node("Concat", ["outer", "blocks", "width"], ["cut"], axis=0),
        helper.make_node("Reshape", ["x", "cut"], ["in_blocks"]),
        helper.make_node("ReduceSum", ["in_blocks", "last"], ["sums"], keepdims=0),
        helper.make_node("Transpose", ["offsets"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["sums", "columns"], ["moved"]),
        helper.make_node("Add", ["moved", "unmoved"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB_DOMAIN, 1)]
    inputs = ["x", "codes", "scales", "offsets", "order", "bias"]
    return helper.make_function(OWN_DOMAIN, "MatMulNBits", inputs, ["y"], nodes, opsets, list(attrs))


def channel_product(writer: GraphWriter, dtype: str, x: str, modules: tuple[str, ...], path: str) -> str:
    """A product of whole numbers: rows of ``x``, with the inputs' factors, rounded to int8 with a scale of their own each.

    Whatever stands beside a row, its sums are exact and its own. Codes are read as int8 and inputs as uint8 about 128, for which
    x86 has its instructions. In a row of zeros they are any codes at all, from 0 / 0, and the row's largest takes them away.
    """
    axis, share, middle = writer.constant([-1], "int64"), writer.constant(1 / 127, dtype), writer.constant(128, "uint8")
    largest = writer.op("ReduceMax", [writer.op("Abs", [x], f"{path}/inputs"), axis], f"{path}/inputs")
    parts = writer.op("Div", [x, largest], f"{path}/inputs/parts")
    operands = [
        writer.op("QuantizeLinear", [parts, share, middle], f"{path}/inputs"),
        _signed_columns(writer, modules, path),
        share,
        _column_scales(writer, dtype, modules, path),
        middle,
    ]
    (product,) = writer.node("MatMulIntegerToFloat", operands, path, contrib=True)
    product = writer.op("Mul", [product, largest], path)
    bias = biases(writer, modules)
    return writer.op("Add", [product, *bias], f"{path}/bias") if bias else product


def _signed_columns(writer: GraphWriter, modules: tuple[str, ...], path: str) -> str:
    """Codes as int8 [in, out], which sessions fold: their highest bit is turned, which takes 128 away."""
    codes = writer.weight(*(f"{module}.{contract.CODES}" for module in modules))
    outputs, _, width = writer.dims(codes)
    flat = writer.once("Reshape", [codes, writer.constant([outputs, width], "int64")], f"{path}/codes", {})
    turned = writer.once("BitwiseXor", [flat, writer.constant(128, "uint8")], f"{path}/codes", {})
    columns = writer.once("Transpose", [turned], f"{path}/codes", {"perm": [1, 0]})
    return writer.once("Cast", [columns], f"{path}/codes", {"to": ONNX_DTYPES["int8"]})


def _column_scales(writer: GraphWriter, dtype: str, modules: tuple[str, ...], path: str) -> str:
    return writer.once(
        "Reshape", [scales(writer, dtype, modules), writer.constant([-1], "int64")], f"{path}/scales", {}
    )


def dequantised_product(
    writer: GraphWriter, dtype: str, x: str, modules: tuple[str, ...], fmt: BlockFormat, path: str, *, signed: bool
) -> str:
    """The product in standard operators. ``signed``: see :func:`dequantised`."""
    inputs = [x, dequantised(writer, dtype, modules, fmt, signed=signed), *biases(writer, modules)]
    product = writer.op("Gemm", inputs, path, attrs={"transB": 1})
    return _with_offsets(writer, dtype, x, product, modules, fmt, path, casts=dtype != "float32")


def dequantised(writer: GraphWriter, dtype: str, modules: tuple[str, ...], fmt: BlockFormat, *, signed: bool) -> str:
    """Weights [out, in] without their offsets, which is all of them where the format has no minimums; written once.

    ``signed``: the codes are read as two's complements and have no zero point. Such are those of a file made for it, the
    stored ones are unsigned, about the middle. TensorRT wants positive scales of 8 bits, and ours have a sign: there the
    codes alone are dequantised, and scales are factors of their own.
    """
    names = [f"{module}.{contract.CODES}" for module in modules]
    path = f"/stored/{contract.stack_name(names)}"
    if fmt.float8:
        per_row = writer.column(dtype, *(f"{module}.{contract.SCALES}" for module in modules))
        codes = writer.codes(*names, dtype=fmt.codes, width=fmt.block)
        return writer.once("DequantizeLinear", [codes, per_row], path, {"axis": 0})
    per_block = scales(writer, dtype, modules)
    rows, blocks = writer.dims(writer.weight(*(f"{module}.{contract.SCALES}" for module in modules)))
    codes = writer.codes(*names, dtype=f"{'' if signed else 'u'}int{fmt.bits}", width=blocks * fmt.block)
    if not (signed and fmt.bits == 8):
        inputs = [codes, per_block, *([] if signed else [_middles(writer, fmt, rows, blocks)])]
        return writer.once("DequantizeLinear", inputs, path, {"axis": 1, "block_size": fmt.block})
    whole = writer.once("DequantizeLinear", [codes, writer.constant(1.0, dtype)], path, {})
    cut = writer.constant([rows, blocks, fmt.block], "int64")
    column = writer.once("Unsqueeze", [per_block, writer.constant([-1], "int64")], f"{path}/scales", {})
    scaled = writer.once("Mul", [writer.once("Reshape", [whole, cut], f"{path}/blocks", {}), column], path, {})
    return writer.once("Reshape", [scaled, writer.constant([rows, blocks * fmt.block], "int64")], path, {})


def _middles(writer: GraphWriter, fmt: BlockFormat, rows: int, blocks: int) -> str:
    """Zero points of unsigned codes, [rows, blocks]: made in the graph, for all are the same."""
    path, shape = f"/stored/middles/{rows}_{blocks}", writer.constant([rows, blocks], "int64")
    middle = helper.make_tensor("value", ONNX_DTYPES["uint8"], [1], [1 << fmt.bits - 1])
    made = writer.once("ConstantOfShape", [shape], f"{path}/int{fmt.bits}", {"value": middle})
    return made if fmt.bits == 8 else writer.once("Cast", [made], path, {"to": ONNX_DTYPES["uint4"]})


def _with_offsets(
    writer: GraphWriter,
    dtype: str,
    x: str,
    product: str,
    modules: tuple[str, ...],
    fmt: BlockFormat,
    path: str,
    *,
    casts: bool,
) -> str:
    """``product`` and what the offsets of the weights' blocks add to it; ``casts``: sums over blocks are told to be float32."""
    if not fmt.minimums:
        return product
    added = offsets(writer, dtype, modules, fmt, path)
    _, blocks = writer.dims(writer.weight(*(f"{module}.{contract.MINIMUMS}" for module in modules)))
    cut = writer.op("Reshape", [x, writer.constant([-1, blocks, fmt.block], "int64")], f"{path}/blocks")
    if casts:
        cut = writer.op("Cast", [cut], f"{path}/block_sums/to_float32", attrs={"to": ONNX_DTYPES["float32"]})
    sums = writer.op("ReduceSum", [cut, writer.constant([-1], "int64")], f"{path}/block_sums", attrs={"keepdims": 0})
    if casts:
        sums = writer.op("Cast", [sums], f"{path}/block_sums/to_half", attrs={"to": ONNX_DTYPES[dtype]})
    return writer.op("Gemm", [sums, added, product], f"{path}/offsets", attrs={"transB": 1})


def dequantised_table(writer: GraphWriter, dtype: str, module: str, fmt: BlockFormat, path: str) -> str:
    """A quantised table [rows, width] as floats."""
    table = dequantised(writer, dtype, (module,), fmt, signed=False)
    if not fmt.minimums:
        return table
    rows, blocks = writer.dims(writer.weight(f"{module}.{contract.MINIMUMS}"))
    cut = writer.op("Reshape", [table, writer.constant([rows, blocks, fmt.block], "int64")], f"{path}/blocks")
    last = writer.constant([-1], "int64")
    added = writer.op("Unsqueeze", [offsets(writer, dtype, (module,), fmt, path), last], f"{path}/offset")
    moved = writer.op("Add", [cut, added], f"{path}/moved")
    return writer.op("Reshape", [moved, writer.constant([rows, blocks * fmt.block], "int64")], f"{path}/moved")


def scales(writer: GraphWriter, dtype: str, modules: tuple[str, ...]) -> str:
    """Scales [out, blocks] in the graph's type."""
    return writer.weight_as(dtype, *(f"{module}.{contract.SCALES}" for module in modules))


def offsets(writer: GraphWriter, dtype: str, modules: tuple[str, ...], fmt: BlockFormat, path: str) -> str:
    """What a block adds to each of its weights beside ``scale * (code - middle)``, [out, blocks].

    Computed in float32, whatever the graph's type: rounded once, and ONNX Runtime, which folds constants with the CPU's kernels,
    has none for half precision and would compute them anew in every run.
    """
    half = writer.constant(fmt.levels / 2, "float32")
    moved = writer.once("Mul", [scales(writer, "float32", modules), half], f"{path}/offsets/moved", {})
    minimums = writer.weight_as("float32", *(f"{module}.{contract.MINIMUMS}" for module in modules))
    made = writer.once("Add", [minimums, moved], f"{path}/offsets", {})
    return made if dtype == "float32" else writer.once("Cast", [made], f"{path}/offsets", {"to": ONNX_DTYPES[dtype]})


def zero_points(writer: GraphWriter, modules: tuple[str, ...], fmt: BlockFormat, path: str) -> str:
    """The codes that stand for zero, uint8 [out, blocks / 2] as MatMulNBits takes them: two a byte, the lower half first.

    Made of minimums and scales in float32, which gives whole numbers as they are; sessions fold it.
    """
    names = [f"{module}.{contract.MINIMUMS}" for module in modules]
    _, blocks = writer.dims(writer.weight(*names))
    per_block, none = scales(writer, "float32", modules), writer.constant(0.0, "float32")
    is_none = writer.once("Equal", [per_block, none], f"{path}/zeros", {})  # any code is zero then: 0 / 1 for 0 / 0
    steps = writer.once("Where", [is_none, writer.constant(1.0, "float32"), per_block], f"{path}/zeros", {})
    below = writer.once("Div", [writer.weight_as("float32", *names), steps], f"{path}/zeros/below", {})
    middle = writer.constant(float((1 << fmt.bits - 1) - fmt.levels // 2), "float32")
    zeros = writer.once("Round", [writer.once("Sub", [middle, below], f"{path}/zeros", {})], f"{path}/zeros", {})
    if blocks % 2:
        zeros = writer.once("Pad", [zeros, writer.constant([0, 0, 0, 1], "int64")], f"{path}/zeros", {})
    axis, step, stop = (writer.constant([number], "int64") for number in (1, 2, blocks + 1))
    lower, upper = (
        writer.once("Slice", [zeros, writer.constant([first], "int64"), stop, axis, step], f"{path}/zeros/{half}", {})
        for first, half in enumerate(("lower", "upper"))
    )
    raised = writer.once("Mul", [upper, writer.constant(16.0, "float32")], f"{path}/zeros/upper", {})
    together = writer.once("Add", [lower, raised], f"{path}/zeros", {})
    return writer.once("Cast", [together], f"{path}/zeros", {"to": ONNX_DTYPES["uint8"]})


def gathered_blocks(writer: GraphWriter, dtype: str, module: str, fmt: BlockFormat, ids: str, path: str) -> str:
    """Rows of a quantised table in ONNX Runtime's own operator: [..., blocks, block] for ids of any shape."""
    codes, last = writer.weight(f"{module}.{contract.CODES}"), writer.constant([-1], "int64")
    per_block = writer.once("Unsqueeze", [scales(writer, dtype, (module,)), last], f"{path}/scales", {})
    attrs = {"gather_axis": 0, "quantize_axis": 2, "block_size": fmt.block, "bits": fmt.bits}
    (rows,) = writer.node("GatherBlockQuantized", [codes, ids, per_block], path, contrib=True, attrs=attrs)
    if not fmt.minimums:
        return rows
    offset = writer.op("Gather", [offsets(writer, dtype, (module,), fmt, path), ids], f"{path}/offset")
    return writer.op("Add", [rows, writer.op("Unsqueeze", [offset, last], f"{path}/offset")], f"{path}/moved")
