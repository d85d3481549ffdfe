"""What stands beside the engines of a bundle: ``engines/<key>/engine.json``, written by `dmtd build`, read before any engine.

An engine fits one library version, one kind of GPU and one content of the bundle, and says none of it until it is
deserialised, if then. So the record says it, and ``engine_choice`` compares it with the machine first. No TensorRT, no onnx,
no torch here.

**Engines.** A record holds ``thinking`` and ``late_decode``, and ``full_pass`` where it was asked for. They want all activation
memory from their user (TensorRT-RTX: REQUIRE_USER_ALLOCATION), so that a run may be captured. Their inputs and outputs are
those of the standard dialect (``dmtd_export.graphs.build``), with four differences:

1. ``embedding_table`` [vocab, hidden] in every engine, and ``lm_head_table`` [vocab, hidden] where lm_head is tied to it
   (an untied head, and a quantised one, stays a weight of late_decode): :attr:`EngineFile.tables` maps each such input to a
   weight of the bundle, which is uploaded as floats of the bundle's type (``tables``). Upload each once, bind the one buffer
   to all inputs that name it, both in one engine too.
2. KV inputs and outputs have the fixed capacity of the record, ``[batch, kv_heads, capacity, head_dim]``; ``present.*`` must be
   bound to the address of ``past_key_values.*`` (:attr:`EngineFile.aliases`). Allocate for ``max_num_seqs`` once, zero-filled
   (NaN in a stale row survives a mask), 256-byte aligned; a run of ``batch`` < max_num_seqs binds the same addresses
   and takes the first ``batch`` slots. A run over slots i, i+1, ... binds addresses moved by i slots, if those are aligned.
3. ``visible_rows`` int64 [visible_len] holds 0, 1, 2, ...: attention reads the first ``visible_len`` cache rows only. Fill one
   buffer of ``capacity`` once and bind it with the shape of the bucket. It must reach past the last row written in the run,
   padding included: ``write_index + rows <= visible_len <= capacity`` for every sequence. TensorRT ignores a write past the
   end and attends to what is there, silently, so the runtime checks.
4. ``logit_rows`` names one row a sequence (num_logits is 1 in every profile). A pass that wants no logits names any row.

**Profiles.** Make one execution context per (engine, profile), chosen by :meth:`EngineFile.profile_for`:

| profile | engine | rows | visible_len |
|---|---|---|---|
| prefill | all | 1 to ``prefill_chunk`` | any bucket |
| refill | thinking, full_pass | 1 to ``cycle_length`` | any bucket |
| step | late_decode | 1 | buckets up to ``sliced_limit`` |
| step_whole | late_decode | 1 | exactly ``capacity`` |
| choose | choose_token, ... | logits of one row a sequence | none |

``choose_token`` and what else chooses tokens from logits on the device are engines beside them, without tables or caches.
(With a cycle length of 1 a refill has one row too, and then a refill_whole.)

``length_buckets`` are the values of visible_len to use (any other in a profile's range would run as well, but each costs a
captured graph): the smallest that holds the longest sequence of the batch after the run, see :meth:`EngineRecord.bucket_for`; a
profile that is ``whole`` takes the capacity in its place, see :meth:`ProfileInfo.visible_len`. Why: ``dmtd_export.engines.plan``.
``batch_buckets`` are the batch sizes to capture graphs for; every size up to ``max_num_seqs`` runs.

**Memory.** Device memory of a record is the tables once, the engines' ``weight_bytes``, one activation buffer of the largest
``scratch_bytes`` (once deserialised ``engine.device_memory_size_v2`` has the exact number: a library that compiles at load may
choose otherwise), and the caches: :meth:`EngineRecord.device_bytes` adds them up for the refusal before allocating.

**First runs.** TensorRT-RTX compiles kernels when a context first runs; ``device/kernel_cache.py`` keeps them, and
``backends/engines/warm_up.py`` lists the runs that bring them all about.

The simulator holds engine graphs as ONNX (``file`` ends in .onnx, weights beside it) for a runtime that executes them in
ONNX Runtime on the CPU; everything else in the record is as for the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmtd_errors.words import reason
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.contract import GraphName
from dmtd_runtime.bundle.json_records import decode
from dmtd_runtime.bundle.manifest import DTYPE_BYTES, FileInfo, Manifest, TensorInfo, safe_relative, sha256_of
from dmtd_runtime.errors import BundleError, RequestError

EngineBackend = Literal["tensorrt", "tensorrt-rtx", "simulator"]
FullPass = Literal["staged", "fused"]
PassKind = Literal["prefill", "refill", "step", "choose"]
ENGINE_BACKENDS: tuple[EngineBackend, ...] = ("tensorrt", "tensorrt-rtx", "simulator")
ANY_GPU = "any"
OLDEST_CAPABILITY = "8.0"  # that has bfloat16 and TensorRT's fused attention
FLOAT8_CAPABILITY = "8.9"  # the oldest with floats of 8 bits, which TensorRT compiles for no older one
RECORD_SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRange:
    """Smallest, preferred and largest shape of one input in one profile."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileInfo:
    """One optimisation profile. ``index`` is its number in the engine; ``inputs`` holds the inputs of changing shape."""

    index: int
    kind: PassKind
    whole: bool  # visible_len is the capacity, nothing is cut out of the cache
    max_rows: int
    min_visible: int
    max_visible: int
    inputs: Mapping[str, InputRange]

    @property
    def name(self) -> str:
        """As the table of the module calls it."""
        return f"{self.kind}_whole" if self.whole else self.kind

    def visible_len(self, bucket: int) -> int:
        """The length of ``visible_rows`` to bind for a length bucket: the bucket, or the capacity where that is fixed."""
        return max(bucket, self.min_visible)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFile:
    """One engine: its file, its full I/O contract and its profiles."""

    graph: GraphName
    file: str  # inside engines/<key>/
    bytes: int
    sha256: str
    weight_bytes: int  # constants inside the engine
    scratch_bytes: int | None  # as the builder planned it; None: the builder did not say
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    tables: Mapping[str, str]  # input -> weight of the bundle, in floats whatever its format
    aliases: Mapping[str, str]  # output -> input with the same address
    profiles: tuple[ProfileInfo, ...]
    seconds: float = 0.0  # that the build took
    peak_bytes: int = 0  # anonymous memory that the build added at its highest
    tactics: tuple[str, ...] = ()  # runners and tactics that the builder chose, as far as it says

    def profile_for(self, kind: PassKind, *, batch: int, rows: int, visible_len: int) -> ProfileInfo:
        """The profile that takes such a run; ``visible_len`` is a length bucket (0 for choose).

        Raises:
            RequestError: names the input that no profile takes, and its bounds.
        """
        fitting = [profile for profile in self.profiles if profile.kind == kind]
        if not fitting:
            has = ", ".join(profile.name for profile in self.profiles)
            raise RequestError(
                f"{self.graph}: no {kind} profile, only {has}; rebuild the engines with: dmtd build BUNDLE"
            )
        most_rows = max(profile.max_rows for profile in fitting)
        if not 1 <= rows <= most_rows:
            raise RequestError(f"{self.graph}, {kind}: got {rows} rows, expected 1 to {most_rows}")
        first = self.inputs[0].name
        most = max(profile.inputs[first].max[0] for profile in fitting)
        if not 1 <= batch <= most:
            raise RequestError(
                f"{self.graph}, {first}: got a batch of {batch}, expected 1 to {most}; "
                f"build for more with: dmtd build BUNDLE --max-num-seqs {batch}"
            )
        for profile in fitting:
            if visible_len <= profile.max_visible:
                return profile
        raise RequestError(
            f"{self.graph}, {contract.VISIBLE_ROWS}: got a length of {visible_len}, "
            f"expected at most {fitting[-1].max_visible}; "
            "build for longer sequences with: dmtd build BUNDLE --max-model-len N"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFacts:
    """How the engines were made; for people and reports, nothing depends on it."""

    seconds: float
    peak_bytes: int  # anonymous memory that the largest build added at its highest
    tools: Mapping[str, str]
    machine: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """engine.json."""

    schema: int
    backend: EngineBackend
    version: str  # of the library; an engine runs on no other
    compute_capability: str  # "8.9", or "any" (tensorrt-rtx)
    gpu_name: str | None  # tensorrt: the GPU that tactics were timed on
    content_sha256: str  # of what engines are made from, see content_hash
    dtype: Literal["float32", "float16", "bfloat16"]
    max_num_seqs: int
    max_model_len: int
    capacity: int
    prefill_chunk: int
    cycle_length: int
    sliced_limit: int  # longest bucket that a late step cuts out of its cache; 0: it always reads the whole
    batch_buckets: tuple[int, ...]
    length_buckets: tuple[int, ...]
    engines: tuple[EngineFile, ...]
    build_arguments: str  # of the `dmtd build BUNDLE` that builds these engines again
    build: BuildFacts
    files: Mapping[str, FileInfo] = field(default_factory=dict)  # others in the directory
    verification: Mapping[str, Any] = field(default_factory=dict)  # empty: not asked for
    supported: tuple[str, ...] = ()  # "any": capabilities that the library names, later ones run too; empty: no limit

    def engine(self, graph: GraphName) -> EngineFile:
        """The engine of a graph; BundleError if the record has none."""
        for engine in self.engines:
            if engine.graph == graph:
                return engine
        raise BundleError(
            f"the engines hold no {graph}, only {', '.join(e.graph for e in self.engines)}; "
            f"build it with: dmtd build BUNDLE{' --fused' if graph == contract.FULL_PASS else ''}"
        )

    def runs_on(self, compute_capability: str) -> bool:
        """Whether a GPU of this capability may run the engines: the one they are for; "any" is from 8.0 on, named or not."""
        if self.compute_capability != ANY_GPU:
            return self.compute_capability == compute_capability
        return not self.supported or is_new_enough(compute_capability)

    def rebuild_command(self, bundle: Path) -> str:
        """The command that builds these engines again."""
        return f"dmtd build {shlex.quote(str(bundle))} {self.build_arguments} --force"

    def bucket_for(self, length: int) -> int:
        """The smallest length bucket that holds ``length`` cache rows. RequestError where none does."""
        for bucket in self.length_buckets:
            if bucket >= length:
                return bucket
        raise RequestError(
            f"{contract.VISIBLE_ROWS}: got {length} cache rows, the engines hold {self.capacity}; "
            "build for longer sequences with: dmtd build BUNDLE --max-model-len N"
        )

    def full_pass_for(self, wish: FullPass | None, manifest: Manifest) -> FullPass:
        """How a runtime runs full passes over these engines: as wished, else the default as far as they were built for it."""
        fused = any(engine.graph == contract.FULL_PASS for engine in self.engines)
        return wish or (default_full_pass(manifest) if fused else "staged")

    def engines_for(self, full_pass: FullPass) -> tuple[EngineFile, ...]:
        """The engines that a runtime loads for one way of running full passes: all but thinking, or all but full_pass."""
        other = contract.THINKING if full_pass == "fused" else contract.FULL_PASS
        return tuple(engine for engine in self.engines if engine.graph != other)

    def device_bytes(self, manifest: Manifest, full_pass: FullPass = "staged", max_num_seqs: int | None = None) -> int:
        """Device memory that a runtime needs: weights, tables once, one activation buffer, caches of ``max_num_seqs`` slots."""
        engines = self.engines_for(full_pass)
        tables = {tensor for engine in engines for tensor in engine.tables.values()}
        caches = {info.name: info for e in engines for info in e.inputs if contract.cache_name(info.name)}
        slots = self.max_num_seqs if max_num_seqs is None else max_num_seqs
        return (
            sum(manifest.table_bytes(name) for name in tables)
            + sum(engine.weight_bytes for engine in engines)
            + max(engine.scratch_bytes or 0 for engine in engines)
            + sum(slots * _row_bytes(info) for info in caches.values())
        )

    def check_files(self, directory: Path, *, hashes: bool) -> None:
        """Raise BundleError for an engine file that is missing, truncated or (``hashes``) altered."""
        again = f"build it again with: {self.rebuild_command(directory.parent.parent)}"
        listed = {engine.file: FileInfo(bytes=engine.bytes, sha256=engine.sha256) for engine in self.engines}
        for name, info in {**listed, **self.files}.items():
            path = directory / safe_relative(name)
            if not path.is_file():
                raise BundleError(f"{path} is missing, its record lists it; {again}")
            if (size := path.stat().st_size) != info.bytes:
                raise BundleError(
                    f"{path} has {size} bytes, its record says {info.bytes}: truncated or altered; {again}"
                )
            if hashes and (got := sha256_of(path)) != info.sha256:
                raise BundleError(
                    f"{path} has SHA-256 {got[:16]}..., its record says {info.sha256[:16]}...: altered; {again}"
                )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def oldest_capability(manifest: Manifest) -> str:
    """The oldest GPU that has what engines of a bundle are made of."""
    return FLOAT8_CAPABILITY if any(fmt.float8 for fmt in manifest.quantised.values()) else OLDEST_CAPABILITY


def is_new_enough(compute_capability: str, oldest: str = OLDEST_CAPABILITY) -> bool:
    """Whether a GPU of this capability, "8.9", has what engines are made of."""
    got, least = ([int(number) for number in text.split(".")] for text in (compute_capability, oldest))
    return got >= least


def default_full_pass(manifest: Manifest) -> FullPass:
    """Fused where the split has encoding layers, which a staged full pass would read twice; staged, the smaller, elsewhere."""
    return "fused" if manifest.cycle.encoding_layers else "staged"


def _row_bytes(info: TensorInfo) -> int:
    """Bytes of one slot of a KV input [batch, kv_heads, capacity, head_dim]."""
    count = DTYPE_BYTES[info.dtype]
    for dim in info.dims[1:]:
        assert isinstance(dim, int), f"{info.name} has the dimension {dim}, engines have a fixed capacity"
        count *= dim
    return count


def content_hash(manifest: Manifest) -> str:
    """SHA-256 over what engines are made from: the split, and by their hashes in the manifest the weights, config.json and the
    graphs that choose tokens.
    """
    cycle, choices = manifest.cycle, [graph.file for graph in manifest.choice_graphs]
    lines = [f"E{cycle.encoding_layers} T{cycle.thinking_layers} D{cycle.decoding_layers}\n"]
    for name in sorted({contract.WEIGHTS_FILE, contract.CONFIG_FILE, *choices}):
        lines.append(f"{name} {manifest.files[name].sha256 if name in manifest.files else 'missing'}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def engine_directory(bundle: Path, key: str) -> Path:
    """Where the engines of ``key`` stand."""
    return bundle / contract.ENGINES_DIRECTORY / key


def read_record(directory: Path) -> EngineRecord:
    """Read ``directory``/engine.json; BundleError in one line for whatever is wrong with it."""
    path = directory / contract.ENGINE_RECORD_FILE
    bundle = shlex.quote(str(directory.parent.parent))
    again = f"remove {shlex.quote(str(directory))} and build its engines again with: dmtd build {bundle}"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({reason(error)}); {again}") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != RECORD_SCHEMA:
        raise BundleError(f"{path} has schema {schema!r}, this version reads {RECORD_SCHEMA}; {again}")
    try:
        record: EngineRecord = decode(EngineRecord, raw, "engine")
        for name in (*(engine.file for engine in record.engines), *record.files):
            safe_relative(name)
        for engine in record.engines:
            _check_names(engine)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path}: {error}; {again}") from None
    if not record.engines or not record.length_buckets or record.length_buckets[-1] != record.capacity:
        raise BundleError(f"{path}: no engines, or length buckets that do not end at the capacity; {again}")
    return record


def _check_names(engine: EngineFile) -> None:
    """Raise ValueError where tables, aliases or profiles name what is no input or output of the engine."""
    inputs, outputs = ({info.name for info in infos} for infos in (engine.inputs, engine.outputs))
    ranged = {name for profile in engine.profiles for name in profile.inputs}
    for what, named, known in (
        ("input", {*engine.tables, *engine.aliases.values(), *ranged}, inputs),
        ("output", set(engine.aliases), outputs),
    ):
        if unknown := sorted(named - known):
            raise ValueError(f"{engine.graph} has no {what} {unknown[0]}")
    first = engine.inputs[0].name if engine.inputs else ""
    if not engine.profiles or any(first not in profile.inputs for profile in engine.profiles):
        raise ValueError(f"{engine.graph} has no profile, or one without the input {first}")


def records(bundle: Path, *, damaged: list[BundleError] | None = None) -> list[tuple[Path, EngineRecord]]:
    """All engine directories of a bundle that hold a record, newest first.

    Raises:
        BundleError: a record cannot be read, where there is no list ``damaged`` to take the error.
    """
    root = bundle / contract.ENGINES_DIRECTORY
    if not root.is_dir():
        return []
    found = [
        path.parent for path in root.glob(f"*/{contract.ENGINE_RECORD_FILE}") if not path.parent.name.startswith(".")
    ]
    found.sort(key=lambda path: (-(path / contract.ENGINE_RECORD_FILE).stat().st_mtime_ns, path.name))
    read = []
    for path in found:
        try:
            read.append((path, read_record(path)))
        except BundleError as error:
            if damaged is None:
                raise
            damaged.append(error)
    return read
