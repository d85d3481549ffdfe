"""Engines of the simulator: an engine graph in ONNX Runtime, bound by address, every run checked before it is made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import EngineFile, read_record
from dmtd_runtime.device.base import ALIGNMENT, Address, Array, EngineTensor
from dmtd_runtime.device.simulator.memory import Block, SeamError, SimulatedStream
from dmtd_runtime.errors import BackendError
from dmtd_runtime.ort.session import open_session

ORT_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
}


class SimulatedEngine:
    """An engine graph in ONNX Runtime. See :class:`dmtd_runtime.device.base.Engine`."""

    scratch_bytes = 4 * ALIGNMENT

    def __init__(self, device: SimulatedStream, path: Path, threads: int) -> None:
        self.device, self.file = device, _recorded(path)
        self.session = open_session(path, threads=threads)
        infos: list[tuple[Any, bool]] = [(info, True) for info in self.session.get_inputs()]
        infos += [(info, False) for info in self.session.get_outputs()]
        self.tensors: dict[str, EngineTensor] = {}
        for info, is_input in infos:
            cache = contract.cache_name(info.name)
            self.tensors[info.name] = EngineTensor(
                name=info.name,
                dims=tuple(dim if isinstance(dim, int) else -1 for dim in info.shape),
                dtype=ORT_DTYPES[info.type].name,
                is_input=is_input,
                alias=contract.past(cache.layer, cache.kind) if cache and not is_input else None,
            )

    def context(
        self, profile: int, shapes: Mapping[str, Sequence[int]], scratch: Address, scratch_bytes: int
    ) -> SimulatedContext:
        self.device.forbid_in_capture("making a context")
        if scratch_bytes < self.scratch_bytes:
            raise SeamError(f"scratch: got {scratch_bytes} bytes, expected {self.scratch_bytes}")
        self.device.tensor(scratch, scratch_bytes, "scratch")
        if self.file is not None:
            _check_profile(self.file, profile, shapes)
        taken = {name: tuple(shape) for name, shape in shapes.items()}
        return SimulatedContext(self, taken, (scratch, scratch + scratch_bytes))


def _recorded(path: Path) -> EngineFile | None:
    """What the record beside the engine says of it; None where there is no record."""
    if not (path.parent / contract.ENGINE_RECORD_FILE).exists():
        return None
    return next((file for file in read_record(path.parent).engines if file.file == path.name), None)


def _check_profile(file: EngineFile, number: int, shapes: Mapping[str, Sequence[int]]) -> None:
    """Rule 7: a library takes a profile's shapes and no others."""
    found = [profile for profile in file.profiles if profile.index == number]
    if not found:
        raise SeamError(f"{file.file}: got profile {number}, it has {len(file.profiles)}")
    for name, allowed in found[0].inputs.items():
        shape = tuple(shapes.get(name, ()))
        fits = len(shape) == len(allowed.min) and all(
            low <= size <= high for low, size, high in zip(allowed.min, shape, allowed.max, strict=True)
        )
        if not fits:
            raise SeamError(f"{name}: got shape {shape}, profile {number} takes {allowed.min} to {allowed.max}")


class SimulatedContext:
    """See :class:`dmtd_runtime.device.base.EngineContext`."""

    def __init__(
        self, engine: SimulatedEngine, shapes: Mapping[str, tuple[int, ...]], scratch: tuple[int, int]
    ) -> None:
        """``scratch``: where its activations begin and end."""
        self._engine, self._device = engine, engine.device
        self._shapes, self._scratch = dict(shapes), scratch
        self._addresses: dict[str, int] = {}
        self._has_run, self._is_warm = False, False  # enqueued, and truly run, which the stream does later
        self._bound: dict[tuple[int, ...], Any] = {}
        for name, tensor in engine.tensors.items():
            if tensor.is_input and not _fits(self._shapes.get(name), tensor.dims):
                raise SeamError(f"{name}: got shape {self._shapes.get(name)}, expected {tensor.dims}")
        sizes = self._sizes()
        for info in engine.session.get_outputs():
            self._shapes[info.name] = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in info.shape)
        self._num_bytes = {
            name: math.prod(self._shapes[name]) * np.dtype(tensor.dtype).itemsize
            for name, tensor in engine.tensors.items()
        }
        self._caches = [
            name for name, tensor in engine.tensors.items() if tensor.is_input and contract.cache_name(name)
        ]
        self._updates = self._groups()

    def set_address(self, name: str, address: Address) -> None:
        if name not in self._engine.tensors:
            raise SeamError(f"{name}: the engine has no such input or output")
        if address % ALIGNMENT:
            raise SeamError(f"{name}: address {address:#x} is not a multiple of {ALIGNMENT}")
        self._addresses[name] = address

    def is_capturable(self) -> bool:
        self._device.forbid_in_capture("asking whether a context may be captured")
        return True

    def enqueue(self) -> None:
        if self._device.capturing and not self._has_run:
            raise SeamError("a context is captured that has not run before: warm it up first")
        missing = [name for name in self._engine.tensors if name not in self._addresses]
        if missing:
            raise SeamError(f"{missing[0]}: no address was set")
        addresses = dict(self._addresses)  # what a later set_address changes is not this run's
        self._check_overlaps(addresses)
        self._has_run |= not self._device.capturing
        self._device.push(lambda: self._run(addresses))

    def _run(self, addresses: Mapping[str, int]) -> None:
        tensors = self._engine.tensors
        if not self._is_warm:
            self._is_warm = True
            self._device.stall()
        spans = {name: self._device.tensor(addresses[name], self._num_bytes[name], name) for name in tensors}
        for name, tensor in tensors.items():
            if tensor.is_input:
                self._device.require_written(*spans[name], name)
        self._check_updates(spans)
        self._session_run(addresses)
        for name, tensor in tensors.items():
            if not tensor.is_input:
                block, span = spans[name]
                block.written[span] = True

    def _session_run(self, addresses: Mapping[str, int]) -> None:
        key = tuple(addresses.values())
        if key not in self._bound:
            binding = self._bound[key] = self._engine.session.io_binding()
            for name, tensor in self._engine.tensors.items():
                bind = binding.bind_input if tensor.is_input else binding.bind_output
                bind(name, "cpu", 0, np.dtype(tensor.dtype), self._shapes[name], addresses[name])
        try:
            self._engine.session.run_with_iobinding(self._bound[key])
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {str(error).strip().splitlines()[0][:300]}") from error

    def _check_overlaps(self, addresses: Mapping[str, int]) -> None:
        """Rule 2, and rule 1 as far as it can be seen before the run."""
        spans = sorted((address, address + self._num_bytes[name], name) for name, address in addresses.items())
        for name, tensor in self._engine.tensors.items():
            self._device.tensor(addresses[name], self._num_bytes[name], name)
            if tensor.alias is not None and addresses[name] != addresses[tensor.alias]:
                raise SeamError(f"{name}: must lie at the address of {tensor.alias}, which it updates in place")
        for start, end, name in spans:
            if start < self._scratch[1] and self._scratch[0] < end:
                raise SeamError(f"{name}: overlaps the activations")
        for (_, end, first), (start, _, second) in itertools.pairwise(spans):
            one, other = self._engine.tensors[first], self._engine.tensors[second]
            both_read = one.is_input and other.is_input
            if start < end and not both_read and first not in (other.alias,) and second not in (one.alias,):
                raise SeamError(f"{second}: overlaps {first}")

    def _check_updates(self, spans: Mapping[str, tuple[Block, slice]]) -> None:
        """Rule 4: what TensorRT ignores silently, and rows that would be seen but were never written."""
        for name in self._caches:
            block, span = spans[name]
            batch, _, capacity, _ = self._shapes[name]
            in_use = block.rows.setdefault(span.start, np.zeros(0, np.int64))
            if len(in_use) < batch:
                in_use = np.concatenate([in_use, np.full(batch - len(in_use), 0 if block.fresh else capacity)])
            updates, visible = self._updates, self._visible_len(capacity)
            gaps = block.gaps.setdefault(span.start, {})
            for group, rows in updates:
                for slot, first in enumerate(self._numbers(contract.write_indices(group), spans).tolist()):
                    if first < 0 or first + rows > visible:
                        raise SeamError(f"{name}: slot {slot} writes rows {first} to {first + rows - 1} of {visible}")
                    if len(updates) == 1 and first > in_use[slot]:
                        # Between two cycles T's caches lag behind: padding of an idle slot may stand in its place, and a
                        # refill writes over it from the gap on. Whoever goes on behind the gap has left rows out.
                        if group != "thinking" or gaps.setdefault(slot, first) != first:
                            raise SeamError(
                                f"{name}: slot {slot} writes from row {first}, rows from {in_use[slot]} are not written"
                            )
                        continue
                    gaps.pop(slot, None)
                    in_use[slot] = first + rows
            block.rows[span.start] = in_use

    def _visible_len(self, capacity: int) -> int:
        """Rows of a cache that attention reads: a row written behind them is never seen."""
        return self._shapes.get(contract.VISIBLE_ROWS, (capacity,))[0]

    def _groups(self) -> list[tuple[contract.Group, int]]:
        """The groups that may update a cache in this graph, and the rows of a run; full_pass does not say which it is."""
        inputs = self._engine.tensors
        found: list[tuple[contract.Group, int]] = []
        if contract.write_indices("late") in inputs:
            found.append(("late", self._shapes[contract.GATE_HIDDEN][1]))
        if contract.write_indices("thinking") in inputs:
            found.append(("thinking", self._shapes[contract.INPUT_IDS][1]))
        return found

    def _numbers(self, name: str, spans: Mapping[str, tuple[Block, slice]]) -> Array:
        block, span = spans[name]
        numbers: Array = block.data[span].view(self._engine.tensors[name].dtype)
        return numbers

    def _sizes(self) -> dict[str, int]:
        """Symbolic dimensions by name. SeamError where two inputs disagree."""
        sizes: dict[str, int] = {}
        for info in self._engine.session.get_inputs():
            for dim, size in zip(info.shape, self._shapes[info.name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise SeamError(f"{info.name}: {dim} is {size}, another input has {sizes[dim]}")
        return sizes


def _fits(shape: tuple[int, ...] | None, dims: tuple[int, ...]) -> bool:
    return (
        shape is not None
        and len(shape) == len(dims)
        and all(dim in (-1, size) and size > 0 for size, dim in zip(shape, dims, strict=True))
    )
