"""The engines of one record on a device, with everything that stays where it is: tables, caches, activations, logits.

Flow: ``engine_record`` chooses a directory -> here its engines are loaded and their constant addresses bound ->
``backend.py`` enqueues contexts over inputs that change. Caches are ``[max_num_seqs, kv_heads, capacity, head_dim]``, zeroed
once and never moved; a run of fewer sequences takes the first slots of the same buffers.

It plans no cycles and chooses no tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dmtd_runtime.backends.row_copies import CacheLayout, RowCopies
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import GraphName
from dmtd_runtime.bundle.engine_record import EngineFile, EngineRecord, FullPass, PassKind, ProfileInfo
from dmtd_runtime.bundle.manifest import DTYPE_BYTES, Manifest, TensorInfo
from dmtd_runtime.bundle.tables import table_parts
from dmtd_runtime.device.base import Address, Device, Engine, EngineContext, EngineTensor, check_room
from dmtd_runtime.device.uploading import Uploader
from dmtd_runtime.errors import BackendError, BundleError

TABLES = (contract.LOGIT_BIAS, contract.END_IDS, contract.PROMPT_SEEN, contract.OUTPUT_COUNTS)


class EngineSet:
    """Loaded engines of a record and the buffers they share."""

    def __init__(
        self,
        device: Device,
        bundle: Path,
        directory: Path,
        manifest: Manifest,
        record: EngineRecord,
        *,
        full_pass: FullPass,
        max_num_seqs: int,
        max_rows: int,
    ) -> None:
        """Load everything. ``directory`` holds the engines; ``max_rows`` is the longest window of a run.

        Raises:
            BundleError: no engine among them chooses tokens on the device.
            BackendError: too little device memory, said before anything is allocated; or an engine that does not load.
        """
        self.device, self.record, self.max_num_seqs = device, record, max_num_seqs
        self._files = record.engines_for(full_pass)
        self._manifest, self._max_rows = manifest, max_rows
        self._rebuild = record.rebuild_command(bundle)
        self._infos = {info.name: info for engine in self._files for info in (*engine.inputs, *engine.outputs)}
        self._buffers: dict[str, Address] = {}
        self._contexts: dict[tuple[GraphName, tuple[tuple[str, int], ...], PassKind, Hashable], EngineContext] = {}
        for graph in contract.CHOICE_GRAPHS:
            if all(file.graph != graph for file in self._files):
                raise BundleError(
                    f"{directory} holds no {graph} engine, which chooses tokens on the device; "
                    f"export the bundle again, then build its engines with: {self._rebuild}"
                )
        check_room(device, self._needed_bytes(), _HINT)
        self._uploader = Uploader(device)
        self._engines: dict[GraphName, Engine] = {}
        for engine in self._files:
            self._engines[engine.graph] = device.load_engine(directory / engine.file)
            _check_io(engine, self._engines[engine.graph], self._rebuild)
        self._scratch_bytes = max(engine.scratch_bytes for engine in self._engines.values())
        check_room(device, {"activations": self._scratch_bytes, **self._buffer_bytes()}, _HINT)
        self._scratch = device.alloc(self._scratch_bytes, "activations")
        for name, num_bytes in self._buffer_bytes().items():
            self._buffers[name] = device.alloc(num_bytes, name)
            device.zero(self._buffers[name], num_bytes)
        self._upload_weights(bundle)
        self._upload_visible_rows()
        del self._uploader

    @property
    def vocab_size(self) -> int:
        return self._manifest.model.vocab_size

    @property
    def graphs(self) -> list[GraphName]:
        return list(self._engines)

    def has_engine(self, graph: GraphName) -> bool:
        return graph in self._engines

    def has_input(self, graph: GraphName, name: str) -> bool:
        """Whether an engine has such an input."""
        return any(info.name == name for info in self.record.engine(graph).inputs)

    def input_info(self, name: str) -> TensorInfo | None:
        """An input or output by its name, the same in every engine that has it."""
        return self._infos.get(name)

    def changing_inputs(self, graph: GraphName) -> list[TensorInfo]:
        """The inputs of an engine that the host writes before a run."""
        file = self.record.engine(graph)
        return [info for info in file.inputs if self._constant(file, info.name) is None]

    def buffer(self, name: str) -> Address:
        """A buffer that is always at the same address: thought, logits, a cache, a table of the token choice."""
        return self._buffers[name]

    def context(
        self, graph: GraphName, kind: PassKind, sizes: Mapping[str, int], owner: Hashable = None
    ) -> EngineContext:
        """The context of an engine for one set of sizes, its constant addresses bound.

        A captured graph goes on using what its contexts hold, so it has contexts of its own. All share weights and activations.

        Args:
            graph: which engine.
            kind: what the run is for, which decides the profile.
            sizes: batch, window_len, late_len, num_logits and visible_len (a length bucket), as far as the graph has them.
            owner: who else uses it: the shape of the cycle that is captured, None for single steps.

        Raises:
            RequestError: no profile takes the sizes; names the input and its bounds.
        """
        key = (graph, tuple(sorted(sizes.items())), kind, owner)
        if key not in self._contexts:
            file = self.record.engine(graph)
            profile = self._profile(file, kind, sizes)
            sizes = {**sizes, "visible_len": profile.visible_len(sizes.get("visible_len", 0))}
            context = self._engines[graph].context(
                profile.index, _input_shapes(file, sizes), self._scratch, self._scratch_bytes
            )
            for info in (*file.inputs, *file.outputs):
                if (address := self._constant(file, info.name)) is not None:
                    context.set_address(info.name, address)
            self._contexts[key] = context
        return self._contexts[key]

    def uncapturable(self, owner: Hashable) -> str | None:
        """The file of an engine whose contexts of ``owner`` may not be captured; None where all may."""
        for (graph, _, _, of), context in self._contexts.items():
            if of == owner and not context.is_capturable():
                return self.record.engine(graph).file
        return None

    def zero_buffers(self) -> None:
        """Zero everything that runs write, as it was at first."""
        constant = {*self._table_names(), contract.VISIBLE_ROWS}
        for name, num_bytes in self._buffer_bytes().items():
            if name not in constant:
                self.device.zero(self._buffers[name], num_bytes)

    def move_rows(self, source: int, target: int, rows: int) -> None:
        """Copy the first ``rows`` rows of every cache from one slot over another's."""
        for name, info in self._cache_infos().items():
            row_bytes, pitch, slot_bytes = self._cache_strides(info)
            self.device.copy(
                Address(self._buffers[name] + target * slot_bytes),
                Address(self._buffers[name] + source * slot_bytes),
                row_bytes=rows * row_bytes,
                rows=slot_bytes // pitch,
                target_pitch=pitch,
                source_pitch=pitch,
            )

    def row_copies(self) -> RowCopies:
        """Copies of rows between the caches and the host; scratch memory is taken at the first one."""
        infos = self._cache_infos()
        row, pitch, slot_bytes = self._cache_strides(next(iter(infos.values())))
        layout = CacheLayout(heads=slot_bytes // pitch, capacity=pitch // row, row_bytes=row)
        return RowCopies(self.device, layout, [self._buffers[name] for name in infos])

    def clear_slot(self, slot: int) -> None:
        """Zero every cache of a slot."""
        for name, info in self._cache_infos().items():
            slot_bytes = self._cache_strides(info)[2]
            self.device.zero(Address(self._buffers[name] + slot * slot_bytes), slot_bytes)

    def _profile(self, file: EngineFile, kind: PassKind, sizes: Mapping[str, int]) -> ProfileInfo:
        rows = {contract.LATE_DECODE: "late_len", contract.THINKING: "window_len", contract.FULL_PASS: "window_len"}
        num_rows = sizes[rows[file.graph]] if file.graph in rows else 1
        return file.profile_for(kind, batch=sizes["batch"], rows=num_rows, visible_len=sizes.get("visible_len", 0))

    def _constant(self, file: EngineFile, name: str) -> Address | None:
        if name in file.tables:
            return self._buffers[file.tables[name]]
        if name in file.aliases:
            return self._buffers[file.aliases[name]]
        return self._buffers.get(name)

    def _cache_infos(self) -> dict[str, TensorInfo]:
        """KV inputs by name, each once."""
        aliased = {name for engine in self._files for name in engine.aliases.values()}
        return {name: self._infos[name] for name in sorted(aliased)}

    def _cache_strides(self, info: TensorInfo) -> tuple[int, int, int]:
        """Bytes of one row of one head, of one head, of one slot."""
        _, heads, capacity, width = info.dims
        assert isinstance(heads, int) and isinstance(capacity, int) and isinstance(width, int), (
            "caches have fixed sizes"
        )
        row = width * DTYPE_BYTES[info.dtype]
        return row, capacity * row, heads * capacity * row

    def _table_names(self) -> set[str]:
        return {tensor for engine in self._files for tensor in engine.tables.values()}

    def _buffer_bytes(self) -> dict[str, int]:
        """Bytes of every buffer but scratch, by name."""
        model = self._manifest.model
        caches = {name: self.max_num_seqs * self._cache_strides(info)[2] for name, info in self._cache_infos().items()}
        width = DTYPE_BYTES[model.dtype] * model.hidden_size
        sizes = {
            **{name: self._manifest.table_bytes(name) for name in sorted(self._table_names())},
            **caches,
            contract.THOUGHT: self.max_num_seqs * self._max_rows * width,
            contract.LOGITS: self.max_num_seqs * model.vocab_size * DTYPE_BYTES["float32"],
            contract.VISIBLE_ROWS: self.record.capacity * DTYPE_BYTES["int64"],
        }
        for name in (*TABLES, contract.NEXT_OUTPUT_COUNTS):
            if name in self._infos:
                sizes[name] = self.max_num_seqs * model.vocab_size * DTYPE_BYTES[self._infos[name].dtype]
        return sizes

    def _needed_bytes(self) -> dict[str, int]:
        """What the device must have free, in the words of the refusal."""
        sizes = self._buffer_bytes()
        caches, tables = set(self._cache_infos()), self._table_names()
        return {
            "engines": sum(engine.weight_bytes for engine in self._files),
            "tables": sum(sizes[name] for name in tables),
            f"caches of {self.max_num_seqs} x {self.record.capacity} rows": sum(sizes[name] for name in caches),
            "activations": max(engine.scratch_bytes or 0 for engine in self._files),
            "other buffers": sum(count for name, count in sizes.items() if name not in caches | tables),
        }

    def _upload_weights(self, bundle: Path) -> None:
        for name in sorted(self._table_names()):
            place: int = self._buffers[name]
            for part in table_parts(bundle, self._manifest, name):
                self._uploader.upload(Address(place), part)
                place += len(part)

    def _upload_visible_rows(self) -> None:
        self._uploader.upload(self._buffers[contract.VISIBLE_ROWS], np.arange(self.record.capacity).view(np.uint8))


_HINT = "lower --max-num-seqs or --max-model-len (dmtd build takes them too), or free the device"


def _input_shapes(file: EngineFile, sizes: Mapping[str, int]) -> dict[str, Sequence[int]]:
    return {info.name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in info.dims) for info in file.inputs}


def _check_io(file: EngineFile, engine: Engine, rebuild: str) -> None:
    """The loaded engine has the record's inputs and outputs. BackendError names the first difference."""
    ranges = _ranges(file)
    for info in (*file.inputs, *file.outputs):
        got = engine.tensors.get(info.name)
        alias = file.aliases.get(info.name)
        if got is None or got.dtype != info.dtype or got.alias != alias or not _dims_fit(got, info, ranges):
            raise BackendError(
                f"{file.file}, {info.name}: the engine has {got}, its record says {info.dtype} {list(info.dims)}"
                f"{f' at the address of {alias}' if alias else ''}; build it again with: {rebuild}"
            )
    extra = set(engine.tensors) - {info.name for info in (*file.inputs, *file.outputs)}
    if extra:
        raise BackendError(
            f"{file.file} also has {sorted(extra)[0]}, its record does not; build it again with: {rebuild}"
        )


def _ranges(file: EngineFile) -> dict[str, tuple[int, int]]:
    """Least and largest size of each symbolic dimension of the inputs, over all profiles."""
    found: dict[str, tuple[int, int]] = {}
    for profile in file.profiles:
        for info in file.inputs:
            if (given := profile.inputs.get(info.name)) is None:
                continue
            for dim, low, high in zip(info.dims, given.min, given.max, strict=True):
                if isinstance(dim, str):
                    least, most = found.get(dim, (low, high))
                    found[dim] = (min(least, low), max(most, high))
    return found


def _dims_fit(got: EngineTensor, info: TensorInfo, ranges: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the engine takes, or gives, every shape that the record's profiles allow.

    A library may tell a dimension that no profile varies as the number it is; and one of an output, which it computes, as open.
    """
    if len(got.dims) != len(info.dims):
        return False
    for size, dim in zip(got.dims, info.dims, strict=True):
        if size == -1 and (isinstance(dim, str) or not got.is_input):
            continue
        if size != dim and not (isinstance(dim, str) and ranges.get(dim) == (size, size)):
            return False
    return True
