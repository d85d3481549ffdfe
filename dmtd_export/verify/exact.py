"""A twin of a quantised bundle whose products do not round their inputs: the bundle's own graphs over the same weights file.

It computes what the stored weights mean, so it can be held to the float32 margin. It is derived from the graph files: a fault
in a file shows in its twin. Products over codes of 4 bits are told not to round. Those over 8 bits, for which ONNX Runtime has
no such kernel but a way ten times slower, become products over floats, ``scale * (code - 128)``, which stand behind the other
weights in the twin's file. So do products of whole numbers, with the nodes that round their inputs (``exact_channels``). Nothing
else is changed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import helper
from onnx.inliner import inline_local_functions

from dmtd_export.bundle.weights import PAGE_BYTES, row_chunks
from dmtd_export.graphs.writer import CONTRIB_DOMAIN
from dmtd_export.verify.exact_channels import all_nodes, branches, channel_products, drop_unread
from dmtd_export.verify.graph_runs import mapped
from dmtd_export.verify.margins import Array
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest, WeightInfo

PRODUCT = "MatMulNBits"
KNOWN_ATTRIBUTES = {"N", "K", "bits", "block_size", "accuracy_level"}
MIDDLE = 128
BIAS = 5  # the place of a product's bias; zero points and an order of its inputs, which no bundle has, stand before it


def exact_twin(directory: Path, manifest: Manifest, target: Path, *, in_floats: bool = True) -> Manifest:
    """Write the twin of ``directory`` into ``target`` and return its manifest (the list of files is not redone).

    ``target`` may be ``directory``, whose graphs are then replaced. ``in_floats`` False: products over 8 bits take the slow way,
    which needs no room, and is there for half precision too.
    """
    loaded = {graph.file: onnx.load(directory / graph.file, load_external_data=False) for graph in manifest.graphs}
    models = {file: inline_local_functions(model) if model.functions else model for file, model in loaded.items()}
    products = {file: list(_products_in_floats(model.graph)) if in_floats else [] for file, model in models.items()}
    source, weights = (directory / contract.WEIGHTS_FILE).resolve(), target / contract.WEIGHTS_FILE
    made: dict[tuple[str, ...], tuple[str, WeightInfo]] = {}
    with ExitStack() as opened:
        if any(products.values()):
            if source != weights.resolve():
                shutil.copyfile(source, weights)
            file = opened.enter_context(weights.open("r+b"))
            for product in (each for found in products.values() for each in found):
                if product.reads not in made:
                    made[product.reads] = f"exact.{len(made)}", _append(file, product, directory)
        elif source != weights.resolve():
            _link(source, weights)
    for name, model in models.items():
        for product in products[name]:
            _put_in_floats(model.graph, product, *made[product.reads])
        drop_unread(model.graph)
        _round_nothing(model.graph)
        onnx.save_model(model, target / name)

    def listed(graph: GraphInfo) -> GraphInfo:
        added = dict.fromkeys(made[product.reads][0] for product in products[graph.file])
        return replace(graph, weights=(*graph.weights, *added))

    return replace(
        manifest,
        weights={**manifest.weights, **dict(made.values())},
        graphs=tuple(listed(graph) for graph in manifest.graphs),
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without a second name for a file
        shutil.copyfile(source, target)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A product over 8 bits that means no more than the formula: its last node, and the initializers that it reads."""

    node: onnx.NodeProto
    inputs: str  # what is multiplied
    bias: tuple[str, ...]  # a node's own
    codes: onnx.TensorProto
    scales: onnx.TensorProto
    shape: tuple[int, int, int]  # outputs, blocks, block: as the node's attributes say

    @property
    def reads(self) -> tuple[str, ...]:
        """What tells it from every other product: places in the weights file, and shape."""
        places = (place.value for tensor in (self.codes, self.scales) for place in tensor.external_data)
        return (*places, *map(str, self.shape))

    def values(self, directory: Path) -> Iterator[Array]:
        """The weight in runs of rows, float32 [rows, inputs]."""
        codes = mapped(self.codes, directory).reshape(self.shape)
        scales, first = mapped(self.scales, directory).reshape(*self.shape[:2], 1), 0
        for rows in row_chunks(codes):
            values = np.subtract(rows, np.float32(MIDDLE), dtype=np.float32)
            values *= scales[first : first + len(rows)].astype(np.float32)
            first += len(rows)
            yield values.reshape(len(rows), -1)


def _products_in_floats(graph: onnx.GraphProto) -> Iterator[_Product]:
    """The products of a graph that become ones over floats; whatever else a node says, its kernel is left to read."""
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.external_data}
    casts = {node.output[0]: node.input[0] for node in all_nodes(graph) if node.op_type == "Cast"}
    for found in channel_products(graph):
        codes, scales = (stored.get(casts.get(name, name)) for name in (found.codes, found.scales))
        if codes and scales and len(codes.dims) == 3:
            outputs, blocks, block = codes.dims
            yield _Product(
                node=found.last,
                inputs=found.inputs,
                bias=(),
                codes=codes,
                scales=scales,
                shape=(outputs, blocks, block),
            )
    for node in all_nodes(graph):
        if node.op_type != PRODUCT:
            continue
        size = {attribute.name: attribute.i for attribute in node.attribute}
        if len(node.input) < 3:
            continue
        codes, scales = stored.get(node.input[1]), stored.get(casts.get(node.input[2], node.input[2]))
        if size.keys() != KNOWN_ATTRIBUTES or size["bits"] != 8 or any(node.input[3:BIAS]) or not (codes and scales):
            continue
        shape = size["N"], size["K"] // max(1, size["block_size"]), size["block_size"]
        if math.prod(shape) == math.prod(codes.dims) and math.prod(shape[:2]) == math.prod(scales.dims):
            bias = tuple(filter(None, node.input[BIAS:]))
            yield _Product(node=node, inputs=node.input[0], bias=bias, codes=codes, scales=scales, shape=shape)


def _append(file: BinaryIO, product: _Product, directory: Path) -> WeightInfo:
    """Write a product's weight as floats at the end of the twin's weights file."""
    start = -(-file.seek(0, os.SEEK_END) // PAGE_BYTES) * PAGE_BYTES
    file.seek(start)
    for rows in product.values(directory):
        file.write(rows.data)
    shape = (product.shape[0], product.shape[1] * product.shape[2])
    return WeightInfo(dtype="float32", shape=shape, offset=start, length=file.tell() - start, norm=0.0, probe=0.0)


def _put_in_floats(graph: onnx.GraphProto, product: _Product, name: str, info: WeightInfo) -> None:
    """Let the product's node be one over the floats at ``info``, which become an initializer ``name``.

    FusedMatMul's, which takes rows of any rank, as the node did; a bias is added behind it.
    """
    if name not in {tensor.name for tensor in graph.initializer}:
        tensor = graph.initializer.add(name=name, data_type=onnx.TensorProto.FLOAT, dims=info.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", contract.WEIGHTS_FILE), ("offset", info.offset), ("length", info.length)):
            tensor.external_data.add(key=key, value=str(value))
    node, [output] = product.node, product.node.output
    made = f"{output}/unbiased" if product.bias else output
    inputs = [product.inputs, name]
    if product.bias:
        added = helper.make_node("Add", [made, *product.bias], [output], name=f"{node.name}/bias")
        owners = ((each.node, [one.output[0] for one in each.node]) for each in (graph, *branches(graph)))
        owner, outputs = next((nodes, outputs) for nodes, outputs in owners if output in outputs)
        owner.insert(outputs.index(output) + 1, added)
    node.CopyFrom(helper.make_node("FusedMatMul", inputs, [made], name=node.name, domain=CONTRIB_DOMAIN, transB=1))


def _round_nothing(graph: onnx.GraphProto) -> None:
    for attribute in (each for node in all_nodes(graph) if node.op_type == PRODUCT for each in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 0
