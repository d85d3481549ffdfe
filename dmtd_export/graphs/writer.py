"""A thin writer over ONNX protobufs: nodes with path-like names, weights by reference into the one external file.

It knows ONNX and nothing of DMTD; ``layers.py`` and ``build.py`` say what to write.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import BlockFormat, TensorInfo, WeightInfo

OPSET = 24
IR_VERSION = 10
CONTRIB_DOMAIN = "com.microsoft"
OWN_DOMAIN = "dmtd"  # of functions: what they compute stands in the file

ONNX_DTYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int64": onnx.TensorProto.INT64,
    "int32": onnx.TensorProto.INT32,
    "uint8": onnx.TensorProto.UINT8,
    "int8": onnx.TensorProto.INT8,
    "uint4": onnx.TensorProto.UINT4,
    "int4": onnx.TensorProto.INT4,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "bool": onnx.TensorProto.BOOL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a conditional gives, by its names in the branches that make it; ``leaves``: as an output of the graph."""

    info: TensorInfo
    then: str | None = None
    otherwise: str | None = None
    leaves: bool = True


class GraphWriter:
    """Collects the nodes, inputs, outputs and initializers of one graph."""

    def __init__(
        self, name: str, weights: Mapping[str, WeightInfo], quantised: Mapping[str, BlockFormat] | None = None
    ) -> None:
        self.name = name
        self.inputs: list[TensorInfo] = []
        self.outputs: list[TensorInfo] = []
        self._weights = weights
        self._quantised = quantised or {}
        self._once: dict[tuple[str, str], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        # The branch being written: what its names begin with, its nodes.
        self._branch: tuple[str, list[onnx.NodeProto]] | None = None
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._contrib = False
        self._functions: dict[str, onnx.FunctionProto] = {}

    def input(self, name: str, dims: Sequence[int | str], dtype: str) -> str:
        """Declare a graph input."""
        self.inputs.append(TensorInfo(name=name, dims=tuple(dims), dtype=dtype))
        return name

    def output(self, name: str, dims: Sequence[int | str], dtype: str) -> str:
        """Declare a graph output; a node must produce ``name``."""
        self.outputs.append(TensorInfo(name=name, dims=tuple(dims), dtype=dtype))
        return name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        path: str,
        *,
        outputs: int | Sequence[str] = 1,
        contrib: bool = False,
        domain: str = "",
        attrs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Add a node named ``{path}/{op}`` and return its outputs' names (given, or derived from the node's name).

        In a branch all names that begin with a slash stand below the branch's own.
        """
        below, nodes = self._branch or ("", self._nodes)
        node_name = f"{below}{path}/{op}"
        if isinstance(outputs, int):
            made = [f"{node_name}_output_{i}" for i in range(outputs)]
        else:
            made = [f"{below}{name}" if name.startswith("/") else name for name in outputs]
        self._contrib |= contrib
        domain = CONTRIB_DOMAIN if contrib else domain
        nodes.append(helper.make_node(op, list(inputs), made, name=node_name, domain=domain, **(attrs or {})))
        return made

    def call(self, function: onnx.FunctionProto, inputs: Sequence[str], path: str, attrs: Mapping[str, Any]) -> str:
        """Add a node that is what ``function`` says, which is written into the file, and return its output's name."""
        self._functions[function.name] = function
        self._contrib |= any(opset.domain == CONTRIB_DOMAIN for opset in function.opset_import)
        [made] = self.node(function.name, inputs, path, attrs=attrs, domain=function.domain)
        return made

    def op(
        self,
        op: str,
        inputs: Sequence[str],
        path: str,
        *,
        output: str | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a standard node with one output and return the output's name."""
        return self.node(op, inputs, path, outputs=[output] if output else 1, attrs=attrs)[0]

    def once(self, op: str, inputs: Sequence[str], path: str, attrs: Mapping[str, Any]) -> str:
        """As :meth:`op` for what several nodes may want of a stored weight: written when it is first asked for, in no branch."""
        if (op, path) not in self._once:
            branch, self._branch = self._branch, None
            self._once[op, path] = self.op(op, inputs, path, attrs=attrs)
            self._branch = branch
        return self._once[op, path]

    @contextlib.contextmanager
    def branch(self, path: str) -> Iterator[list[onnx.NodeProto]]:
        """Inside, nodes are written into the list that is given, for :meth:`conditional`; one branch at a time."""
        assert self._branch is None, "branches do not stand in one another"
        self._branch = path, []
        try:
            yield self._branch[1]
        finally:
            self._branch = None

    def conditional(
        self,
        condition: str,
        path: str,
        then: Sequence[onnx.NodeProto],
        otherwise: Sequence[onnx.NodeProto],
        made: Sequence[Made],
    ) -> None:
        """Run the nodes of one branch or the other, by ``condition``, bool [1]; what a branch does not make is empty."""
        branches = []
        for name, nodes, inner in (
            ("then", list(then), [one.then for one in made]),
            ("else", list(otherwise), [one.otherwise for one in made]),
        ):
            outputs = []
            for one, value in zip(made, inner, strict=True):
                info = replace(one.info, name=value or f"{path}/{name}/{one.info.name}")
                if value is None:
                    info = replace(info, dims=tuple(dim if isinstance(dim, int) else 0 for dim in info.dims))
                    empty = helper.make_tensor("value", ONNX_DTYPES[info.dtype], info.dims, b"", raw=True)
                    nodes.append(
                        helper.make_node("Constant", [], [info.name], name=f"{info.name}/Constant", value=empty)
                    )
                outputs.append(_value_info(info))
            branches.append(helper.make_graph(nodes, f"{path}/{name}", [], outputs))
        for one in made:
            if one.leaves:
                self.output(one.info.name, one.info.dims, one.info.dtype)
        names, attrs = [one.info.name for one in made], {"then_branch": branches[0], "else_branch": branches[1]}
        self.node("If", [condition], path, outputs=names, attrs=attrs)

    def constant(self, value: Sequence[int] | Sequence[float] | int | float, dtype: str) -> str:
        """A small inline initializer; equal constants are shared."""
        array = np.array(value, dtype=np.float32 if dtype in ("float16", "bfloat16") else dtype)
        name = (
            "/constants/" + dtype + "/" + ("_".join(map(str, array.ravel().tolist())) or "empty") + f"_rank{array.ndim}"
        )
        if name not in self._initializers:
            proto = numpy_helper.from_array(array, name)
            if dtype in ("float16", "bfloat16"):
                proto = helper.make_tensor(name, ONNX_DTYPES[dtype], array.shape, array.ravel().tolist())
            self._initializers[name] = proto
        return name

    def weight(self, *names: str) -> str:
        """An initializer over one stored tensor, or over several that stand one behind another, stacked along axis 0."""
        first = self._weights[names[0]]
        return self._stored(names, ONNX_DTYPES[first.dtype], first.shape[1:])

    def codes(self, *names: str, dtype: str, width: int) -> str:
        """As :meth:`weight` over the codes of blocks, as the numbers that they are: [out, ``width``] of ``dtype``."""
        return self._stored(names, ONNX_DTYPES[dtype], (width,))

    def column(self, dtype: str, *names: str) -> str:
        """As :meth:`weight_as` over scales of one block a row: [out]."""
        kind = self._weights[names[0]].dtype
        name = self._stored(names, ONNX_DTYPES[kind], ())
        return (
            name if kind == dtype else self.once("Cast", [name], f"/stored/{name}/{dtype}", {"to": ONNX_DTYPES[dtype]})
        )

    def _stored(self, names: Sequence[str], data_type: int, tail: Sequence[int]) -> str:
        infos = [self._weights[name] for name in names]
        for before, after in itertools.pairwise(infos):
            assert before.offset + before.length == after.offset, f"{names} are not stored one behind another"
            assert before.shape[1:] == after.shape[1:], f"{names} cannot be stacked along axis 0"
        name = contract.stack_name(names)
        if name not in self._initializers:
            proto = onnx.TensorProto(name=name, data_type=data_type)
            proto.dims.extend((sum(info.shape[0] for info in infos), *tail))
            proto.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": contract.WEIGHTS_FILE, "offset": infos[0].offset}
            for key, value in {**place, "length": sum(info.length for info in infos)}.items():
                proto.external_data.add(key=key, value=str(value))
            self._initializers[name] = proto
        return name

    def weight_as(self, dtype: str, *names: str) -> str:
        """As :meth:`weight`, in another type where it is not stored in that one: a Cast, written once."""
        name = self.weight(*names)
        if self._weights[names[0]].dtype == dtype:
            return name
        return self.once("Cast", [name], f"/stored/{name}/{dtype}", {"to": ONNX_DTYPES[dtype]})

    def dims(self, name: str) -> tuple[int, ...]:
        """The dimensions of an initializer."""
        return tuple(self._initializers[name].dims)

    def block_format(self, name: str) -> BlockFormat | None:
        """How a quantised weight is stored; None for floats."""
        return self._quantised.get(name)

    def read_in_branches(self, ops: Collection[str]) -> dict[str, list[str]]:
        """Constants of a float32 graph that nodes of some kinds read within its branches, by their types."""
        kinds = {name: proto.data_type for name, proto in self._initializers.items()}
        casts = {node.output[0]: node.attribute[0].i for node in self._nodes if node.op_type == "Cast"}
        kinds |= {name: casts.get(name, ONNX_DTYPES["float32"]) for name in self._once.values()}
        names, found = {value: name for name, value in ONNX_DTYPES.items()}, dict[str, list[str]]()
        branches = (attribute.g for node in self._nodes for attribute in node.attribute if attribute.HasField("g"))
        read = (name for branch in branches for node in branch.node if node.op_type in ops for name in node.input[1:])
        for name in dict.fromkeys(read):
            if name in kinds:
                found.setdefault(names[kinds[name]], []).append(name)
        return found

    @property
    def weights(self) -> tuple[str, ...]:
        """The initializers that stand in the weights file."""
        return tuple(name for name, proto in self._initializers.items() if proto.external_data)

    def has_weight(self, name: str) -> bool:
        """Whether the weights file holds the tensor."""
        return name in self._weights

    def finish(self, producer_version: str, doc: str) -> onnx.ModelProto:
        """The model as a protobuf without weights (well under 1 MB)."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [_value_info(info) for info in self.inputs],
            [_value_info(info) for info in self.outputs],
            list(self._initializers.values()),
            doc_string=doc,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if self._contrib:
            opsets.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
        if self._functions:
            opsets.append(helper.make_opsetid(OWN_DOMAIN, 1))
        return helper.make_model(
            graph,
            functions=list(self._functions.values()),
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="dmtd",
            producer_version=producer_version,
        )


def _value_info(info: TensorInfo) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(info.name, ONNX_DTYPES[info.dtype], list(info.dims))
