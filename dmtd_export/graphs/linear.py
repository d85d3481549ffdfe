"""A linear layer over the weights as they are stored: one Gemm over floats, or a product over blocks of codes.

Modules whose weights stand one behind another (q, k, v; gate, up) are one product where their formats are equal. In blocks
(see ``BlockFormat``) a weight is ``scale * (code - middle) + offset``: the codes are MatMulNBits' with its own zero point, and
offsets, which only formats with minimums have, are a product over the sums of the inputs' blocks: the kernel's float zero
points are exact as well and run a path 13 to 65 times slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from dmtd_export.graphs.writer import GraphWriter
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import BlockFormat

# How the inputs of a product are rounded: 4, to int8 with a scale for each block of a row. 0 would be not at all.
ACCURACY_LEVEL = 4

Product = Callable[[str, tuple[str, ...], BlockFormat, str], str]


def linear(writer: GraphWriter, x: str, modules: tuple[str, ...], path: str, in_blocks: Product) -> str:
    """``x`` [rows, in] times the stacked weights of ``modules`` (full module paths), with their biases if they have any.

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
    return made[0] if len(made) == 1 else writer.op("Concat", made, path, attrs={"axis": 1})


def biases(writer: GraphWriter, modules: tuple[str, ...]) -> list[str]:
    """The stacked biases of ``modules``, as an operator's last input."""
    return [writer.weight(*(f"{m}.bias" for m in modules))] if writer.has_weight(f"{modules[0]}.bias") else []


def nbits_product(
    writer: GraphWriter, dtype: str, x: str, modules: tuple[str, ...], fmt: BlockFormat, path: str
) -> str:
    """The product in ONNX Runtime's own operators."""
    codes = writer.weight(*(f"{module}.{contract.CODES}" for module in modules))
    rows, blocks, _ = writer.dims(codes)
    bias = biases(writer, modules)
    shape = {"N": rows, "K": blocks * fmt.block, "bits": fmt.bits, "block_size": fmt.block}
    attrs = {**shape, "accuracy_level": ACCURACY_LEVEL}
    inputs = [x, codes, scales(writer, dtype, modules), *(["", "", *bias] if bias else [])]
    (product,) = writer.node("MatMulNBits", inputs, path, contrib=True, attrs=attrs)
    if not fmt.minimums:
        return product
    cut = writer.op("Reshape", [x, writer.constant([-1, blocks, fmt.block], "int64")], f"{path}/blocks")
    sums = writer.op("ReduceSum", [cut, writer.constant([-1], "int64")], f"{path}/block_sums", attrs={"keepdims": 0})
    inputs = [sums, offsets(writer, dtype, modules, fmt, path), product]
    return writer.op("Gemm", inputs, f"{path}/offsets", attrs={"transB": 1})


def scales(writer: GraphWriter, dtype: str, modules: tuple[str, ...]) -> str:
    """Scales [out, blocks] in the graph's type."""
    return writer.weight_as(dtype, *(f"{module}.{contract.SCALES}" for module in modules))


def offsets(writer: GraphWriter, dtype: str, modules: tuple[str, ...], fmt: BlockFormat, path: str) -> str:
    """What a block adds to each of its weights beside ``scale * (code - middle)``, [out, blocks]."""
    half = writer.constant(fmt.levels / 2, dtype)
    moved = writer.op("Mul", [scales(writer, dtype, modules), half], f"{path}/offsets/moved")
    minimums = writer.weight_as(dtype, *(f"{module}.{contract.MINIMUMS}" for module in modules))
    return writer.op("Add", [minimums, moved], f"{path}/offsets")


def gathered_blocks(writer: GraphWriter, dtype: str, module: str, fmt: BlockFormat, ids: str, path: str) -> str:
    """Rows of a quantised table in ONNX Runtime's own operator: [..., blocks, block] for ids of any shape."""
    codes, last = writer.weight(f"{module}.{contract.CODES}"), writer.constant([-1], "int64")
    per_block = writer.op("Unsqueeze", [scales(writer, dtype, (module,)), last], f"{path}/scales")
    attrs = {"gather_axis": 0, "quantize_axis": 2, "block_size": fmt.block, "bits": fmt.bits}
    (rows,) = writer.node("GatherBlockQuantized", [codes, ids, per_block], path, contrib=True, attrs=attrs)
    if not fmt.minimums:
        return rows
    offset = writer.op("Gather", [offsets(writer, dtype, (module,), fmt, path), ids], f"{path}/offset")
    return writer.op("Add", [rows, writer.op("Unsqueeze", [offset, last], f"{path}/offset")], f"{path}/moved")
