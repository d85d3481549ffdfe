"""The inputs and outputs of a session: a place for each set of row counts, written before each run; caches bound once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmtd_runtime.backends.base import Array, RunStats
from dmtd_runtime.backends.onnxruntime.memory import Block, Buffer, OrtMemory
from dmtd_runtime.bundle.manifest import GraphInfo
from dmtd_runtime.errors import BackendError, BundleError
from dmtd_runtime.machine.memory import left_in_words, ran_out
from dmtd_runtime.ort.library import import_onnxruntime
from dmtd_runtime.ort.session import first_line

ONNX_NUMBERS = {"bfloat16": 16, "float8_e4m3fn": 17, "uint4": 21}  # of the types that numpy has not


def host_inputs(session: Any) -> frozenset[str]:
    """The inputs that nodes read in host memory, as the session itself tells."""
    infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return frozenset(info.name for info, memory in infos if memory.name.lower() == "cpu")


def value_at(session: Any, buffer: Buffer, device: tuple[str, int]) -> Any:
    """An OrtValue over memory that is not ONNX Runtime's: what a binding of any session makes of an address."""
    output = session.get_outputs()[0].name
    binding = session.io_binding()
    binding.bind_output(output, *device, _element(buffer), buffer.shape, buffer.address)
    return binding.get_outputs()[0]


def _element(buffer: Buffer) -> Any:
    return ONNX_NUMBERS.get(buffer.dtype) or np.dtype(buffer.dtype)


class SharedIo:
    """An io binding that has a graph's caches in place, for the bindings of all its row counts to take turns with.

    A packed graph of eight slots has hundreds of caches, bound once; what differs from shape to shape is a few dozen tensors.
    """

    def __init__(self, session: Any, graph: GraphInfo, caches: Mapping[str, Buffer], memory: OrtMemory) -> None:
        """``caches``: by input or output name."""
        self.session, self.io = session, session.io_binding()
        self.user: Binding | None = None  # whose small tensors are bound
        self.inputs, self.outputs = (
            [info for info in infos if info.name not in caches] for infos in (graph.inputs, graph.outputs)
        )
        for infos, bind in ((graph.inputs, self.io.bind_input), (graph.outputs, self.io.bind_output)):
            for buffer, name in ((caches[info.name], info.name) for info in infos if info.name in caches):
                bind(name, *memory.device, _element(buffer), buffer.shape, buffer.address)


class Binding:
    """One (graph, row counts): every input and output has its place, written before each run.

    ``arrays`` are the small inputs by name, to be filled between :meth:`begin` and :meth:`run`.
    """

    def __init__(
        self,
        io: SharedIo,
        graph: GraphInfo,
        sizes: Mapping[str, int],
        buffers: Mapping[str, Buffer],
        memory: OrtMemory,
        *,
        graph_id: int | None = None,
    ) -> None:
        """``buffers`` are thought and logits by input or output name; ``sizes`` resolves symbolic dimensions.

        Outputs that are no buffer stand in the block, to be pulled. ``graph_id``: in a session with CUDA graphs, the one
        that these runs are captured into, whose ``io`` is this binding's alone; -1 for none. None elsewhere.
        """
        self._io, self._graph_id = io, graph_id
        self.buffers = dict(buffers)
        inputs, outputs = io.inputs, io.outputs
        self._has_inputs = any(info.name not in buffers for info in inputs)
        self._run_options = _run_options(graph_id) if memory.stream is not None else None
        on_host = host_inputs(io.session) if memory.stream is not None else frozenset()
        shapes = {
            info.name: ([sizes[dim] if isinstance(dim, str) else dim for dim in info.dims], info.dtype)
            for info in (*inputs, *outputs)
            if info.name not in buffers
        }
        self._host_arrays = {name: np.zeros(*shapes.pop(name)) for name in on_host if name in shapes}
        self.block: Block = memory.block(graph.name, [(name, *shape) for name, shape in shapes.items()])
        self.arrays: Mapping[str, Array] = {**self.block.arrays, **self._host_arrays}
        self._inputs = [self._place(info.name, memory) for info in inputs]
        self._outputs = [self._place(info.name, memory) for info in outputs]

    def _place(self, name: str, memory: OrtMemory) -> tuple[Any, ...]:
        """Where a tensor lies, as an io binding wants to be told."""
        if (array := self._host_arrays.get(name)) is not None:
            return name, "cpu", 0, array.dtype, array.shape, array.ctypes.data
        if (buffer := self.buffers.get(name)) is not None:
            return name, *memory.device, _element(buffer), buffer.shape, buffer.address
        array = self.block.arrays[name]
        return name, *memory.device, array.dtype, array.shape, self.block.addresses[name]

    def begin(self) -> None:
        """Before the arrays are filled."""
        self.block.begin()

    def run(self, stats: RunStats) -> None:
        """Run the graph over what stands in ``arrays``; errors of ONNX Runtime become BackendError.

        A GPU may still be at it on return.
        """
        if self._io.user is not self:
            for place in self._inputs:
                self._io.io.bind_input(*place)
            for place in self._outputs:
                self._io.io.bind_output(*place)
            self._io.user = self
        start = time.perf_counter()
        if self._has_inputs:
            self.block.push()
        try:
            self._io.session.run_with_iobinding(self._io.io, self._run_options)
        except Exception as error:
            if ran_out(error):
                raise BackendError(
                    f"not enough memory for this step ({first_line(error)}), {left_in_words()}; send shorter prompts, "
                    "or lower --max-model-len or --max-num-seqs"
                ) from error
            hint = "; try --no-cuda-graphs" if self._graph_id not in (None, -1) else ""
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}{hint}") from error
        stats.session_seconds += time.perf_counter() - start


def check_io(session: Any, graph: GraphInfo) -> None:
    """Hold the manifest's list of a graph's inputs and outputs against the graph itself.

    Raises:
        BundleError: they differ; binding by the list would leave something unbound, or bind another shape.
    """
    for side, found, listed in (
        ("input", session.get_inputs(), graph.inputs),
        ("output", session.get_outputs(), graph.outputs),
    ):
        in_graph = [(info.name, _DTYPES.get(info.type, info.type), tuple(info.shape)) for info in found]
        in_list = [(info.name, info.dtype, info.dims) for info in listed]
        if in_graph != in_list:
            got = next((each for each in in_list if each not in in_graph), "another number or order of them")
            expected = next((each for each in in_graph if each not in in_list), "what the graph has")
            raise BundleError(
                f"{graph.file}: the manifest lists the {side} {got}, expected {expected}; export the bundle again"
            )


_DTYPES = {f"tensor({name})": name for name in ("float16", "bfloat16", "int64", "int32", "int8", "bool")} | {
    "tensor(float)": "float32"
}


def _run_options(graph_id: int | None) -> Any:
    """Options of a run on a GPU: nothing is waited for, the stream keeps the order."""
    run_options = import_onnxruntime().RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if graph_id is not None:
        run_options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return run_options
