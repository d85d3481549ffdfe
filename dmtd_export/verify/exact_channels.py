"""Products of whole numbers in a graph, as ``graphs.linear`` writes them, and what is left of a graph without them.

Written from what the nodes compute and sharing nothing with what wrote them. A product that is anything else, down to its
constants, is not found, and then does not meet the margin of one that rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

PRODUCT = "MatMulIntegerToFloat"
STEP_ERROR = 1e-6  # of 1/127 in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelProduct:
    """``inputs``, with their factors, rounded row by row, times codes, times scales: ``last`` gives it. All but it are names."""

    last: onnx.NodeProto
    inputs: str
    codes: str
    scales: str


def channel_products(graph: onnx.GraphProto) -> Iterator[ChannelProduct]:
    """Those of a graph, and of its branches, whose every node and constant is as it should be."""
    reader = _Reader(graph)
    for node in all_nodes(graph):
        if node.op_type == PRODUCT:
            try:
                yield reader.product(node)
            except (_UnlikeError, ValueError):  # or it has another number of inputs or readers
                continue


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its branches, which have no further ones; names of values are those of the whole."""
    for each in (graph, *branches(graph)):
        yield from each.node


def branches(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graphs of both branches of each ``If``."""
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    return [attribute.g for attribute in attributes if attribute.type == onnx.AttributeProto.GRAPH]


def drop_unread(graph: onnx.GraphProto) -> None:
    """Take out the nodes that nothing reads any longer."""
    wanted = {output.name for output in graph.output}
    for branch in branches(graph):
        drop_unread(branch)
        wanted.update(output.name for output in branch.output)
        wanted.update(name for node in branch.node for name in node.input)
    for node in reversed(list(graph.node)):
        if wanted.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            wanted.update(node.input)


class _UnlikeError(Exception):
    """A node is not what it would have to be."""


class _Reader:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._makers = {output: node for node in all_nodes(graph) for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in all_nodes(graph):
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._inline = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.external_data
        }

    def product(self, node: onnx.NodeProto) -> ChannelProduct:
        """What ``node`` multiplies.

        Raises:
            _UnlikeError: something else.
        """
        rounded, columns, share, column_scales, middle, *rest = node.input
        self._is(not any(rest))
        parts, step, centre = self._made(rounded, "QuantizeLinear")
        for constant in (share, step):
            self._is(bool((abs(self._value(constant) * 127 - 1) < STEP_ERROR).all()))
        for constant in (middle, centre):
            self._constant(constant, 128)
        inputs, largest = self._made(parts, "Div")
        magnitude, axis = self._made(largest, "ReduceMax")
        self._constant(axis, -1)
        self._is(self._made(magnitude, "Abs") == [inputs])
        [last] = self._readers.get(node.output[0], []) or [node]
        self._is(last.op_type == "Mul" and list(last.input) == [node.output[0], largest])
        codes = self._codes(columns)
        scales, flat = self._made(column_scales, "Reshape")
        self._constant(flat, -1)
        return ChannelProduct(last=last, inputs=inputs, codes=codes, scales=scales)

    def _codes(self, columns: str) -> str:
        """The stored codes [out, 1, in], turned into int8 [in, out]."""
        [transposed] = self._made(columns, "Cast", to=onnx.TensorProto.INT8)
        [turned] = self._made(transposed, "Transpose", perm=[1, 0])
        flat, bit = self._made(turned, "BitwiseXor")
        self._constant(bit, 128)
        return self._made(flat, "Reshape")[0]

    def _made(self, name: str, op: str, **attributes: object) -> list[str]:
        """The inputs of the node that makes ``name``, which must be an ``op`` with just these attributes."""
        node = self._makers.get(name)
        self._is(node is not None and node.op_type == op)
        assert node is not None, "it was looked at"
        found = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        self._is(found == attributes)
        return list(node.input)

    def _value(self, name: str) -> np.ndarray:
        self._is(name in self._inline)
        return np.asarray(self._inline[name])

    def _constant(self, name: str, value: float) -> None:
        self._is(bool((self._value(name) == value).all()))

    def _is(self, right: bool) -> None:
        if not right:
            raise _UnlikeError
