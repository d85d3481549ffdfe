"""A stand-in of ONNX Runtime's CUDA provider that computes: the CPU provider over a simulator, behind a GPU's rules.

Sessions, bindings and values look as the CUDA provider's do. Work goes to the simulator's lazy stream, so what is read
without waiting is old, and what is overwritten before it was copied is lost. What a GPU would do silently wrong shows:

1. Memory of the device has no array view; a value bound there is read and written when the stream comes to the run.
2. A value of the host that is bound to a node on the device is copied when it is bound, and never again.
3. What a node reads on the host (a total length) it reads when its kernel is launched; in a captured graph when it was captured.
4. Every byte that a run reads on the device was written before; fresh memory is NaN.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from dmtd_runtime.device.simulator.device import SimulatedDevice

READ_ON_HOST = "total_sequence_length"


class FakeOnnxRuntime:
    """The module, as far as the backend uses it. ``runs`` are the graph ids of all runs, None where none was given."""

    def __init__(self, host: SimulatedDevice) -> None:
        self.host = host
        self.runs: list[str | None] = []
        self.session_options: list[Mapping[str, str]] = []
        self.stale = ""  # inputs of this name keep, in a captured graph, what they had when it was captured

    def SessionOptions(self) -> Any:
        return onnxruntime.SessionOptions()

    def RunOptions(self) -> Any:
        return RunOptions()

    def InferenceSession(self, path: str, settings: Any, *, providers: Sequence[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        (name, options), _ = providers
        assert name == "CUDAExecutionProvider"
        self.session_options.append(options)
        return Session(self, onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"]))


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value


class Session:
    def __init__(self, module: FakeOnnxRuntime, real: Any) -> None:
        self._module, self.real = module, real
        self._captured: dict[tuple[int, str], Mapping[str, np.ndarray]] = {}

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_input_memory_infos(self) -> list[Any]:
        return [SimpleNamespace(name="Cpu" if READ_ON_HOST in i.name else "Cuda") for i in self.real.get_inputs()]

    def io_binding(self) -> Binding:
        return Binding(self, self._module.host)

    def run_with_iobinding(self, binding: Binding, run_options: RunOptions) -> None:
        assert run_options.entries["disable_synchronize_execution_providers"] == "1"
        graph_id = run_options.entries.get("gpu_graph_id")
        self._module.runs.append(graph_id)
        lengths = {name: array.copy() for name, array in binding.on_host.items()}
        if graph_id not in (None, "-1"):
            lengths = dict(self._captured.setdefault((id(binding), str(graph_id)), lengths))

        def work() -> None:
            binding.check_inputs()
            if self._module.stale and graph_id not in (None, "-1"):
                binding.keep_stale(self._module.stale)
            for name, array in lengths.items():
                binding.own[name][:] = array
            self.real.run_with_iobinding(binding.real)
            binding.mark_outputs()

        self._module.host.push(work)


class Binding:
    def __init__(self, session: Session, host: SimulatedDevice) -> None:
        self._session, self._host = session, host
        self.real = session.real.io_binding()
        self.on_host: dict[str, np.ndarray] = {}  # what is read at each launch
        self.own: dict[str, np.ndarray] = {}
        self._inputs: dict[str, tuple[int, int]] = {}
        self._outputs: dict[str, tuple[int, int]] = {}
        self._first: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, device: str, number: int, element: Any, shape: Sequence[int], address: int) -> None:
        if device == "cpu":
            kind = np.dtype(element)
            size = math.prod(shape) * kind.itemsize
            array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(kind).reshape(shape)
            self.own[name] = array.copy()
            if READ_ON_HOST in name:
                self.on_host[name] = array
            address = self.own[name].ctypes.data
        else:
            self._inputs[name] = (address, self._num_bytes(element, shape))
        self.real.bind_input(name, "cpu", 0, element, shape, address)

    def bind_output(
        self, name: str, device: str, number: int, element: Any, shape: Sequence[int], address: int
    ) -> None:
        assert device == "cuda", f"{name}: outputs stay on the device"
        self._outputs[name] = (address, self._num_bytes(element, shape))
        self.real.bind_output(name, "cpu", 0, element, shape, address)

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def check_inputs(self) -> None:
        for name, (address, num_bytes) in self._inputs.items():
            if num_bytes:
                block, span = self._host._span(address, num_bytes, name)
                self._host.require_written(block, span, name)

    def keep_stale(self, word: str) -> None:
        for name, (address, num_bytes) in self._inputs.items():
            if word in name:
                block, span = self._host._span(address, num_bytes, name)
                block.data[span] = self._first.setdefault(name, block.data[span].copy())

    def mark_outputs(self) -> None:
        for name, (address, num_bytes) in self._outputs.items():
            if num_bytes:
                block, span = self._host._span(address, num_bytes, name)
                block.written[span] = True

    def _num_bytes(self, element: Any, shape: Sequence[int]) -> int:
        return math.prod(shape) * (2 if element == 16 else np.dtype(element).itemsize)
