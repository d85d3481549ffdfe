"""`dmtd build`: bundle -> ``bundle/engines/<key>/``. Says what it will take, builds beside the place, exchanges at the end.

    manifest, options -> plan (sizes, profiles) -> engine graphs -> key -> already there? -> builder -> engines, record

Running engines is the runtime's; it reads ``engine.json`` (``dmtd_runtime.bundle.engine_record``) and nothing of this package.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from dmtd_export.bundle.atomic import atomic_directory, remove_all_leftovers
from dmtd_export.bundle.spec import graph_spec
from dmtd_export.disk import check_room, one_line_disk_errors
from dmtd_export.engines.builder import BuiltEngine, build_engine
from dmtd_export.engines.library import Library, load_library, target_of
from dmtd_export.engines.memory import check_memory, expected_peak_bytes, give_back, tight_heap
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.plan import BuildPlan, Target, choice_profile, engine_key, plan_build, profiles
from dmtd_export.engines.simulator import copy_companions, write_simulator_engine
from dmtd_export.engines.weights import copy_weights
from dmtd_export.graphs.engine import EngineGraph, choice_graph, engine_graph, stored_weights
from dmtd_models.progress import Progress, silent
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import (
    ANY_GPU,
    RECORD_SCHEMA,
    BuildFacts,
    EngineFile,
    EngineRecord,
    ProfileInfo,
    content_hash,
    engine_directory,
    is_new_enough,
    oldest_capability,
    read_record,
)
from dmtd_runtime.bundle.manifest import FileInfo, GraphInfo, Manifest
from dmtd_runtime.bundle.opening import cache_directory, open_bundle
from dmtd_runtime.errors import BackendError, BundleError
from dmtd_runtime.version import __version__

DISK_SLACK_BYTES = 16 << 20  # records and such
ENGINE_CODE_BYTES = 1 << 20  # of one layer in one profile, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One engine that will be built: its graph, its profiles, the bytes of its weights."""

    graph: EngineGraph
    profiles: tuple[ProfileInfo, ...]
    weight_bytes: int
    layers: int
    compiled: bool  # False: the simulator's, the graph as it is

    @property
    def expected_peak_bytes(self) -> int:
        return expected_peak_bytes(self.weight_bytes, self.layers, len(self.profiles)) if self.compiled else 0

    @property
    def expected_engine_bytes(self) -> int:
        if not self.compiled:
            return int(self.graph.model.ByteSize())
        return self.weight_bytes + self.layers * len(self.profiles) * ENGINE_CODE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """Everything known before a build: what `--dry-run` shows."""

    bundle: Path
    directory: Path
    target: Target
    plan: BuildPlan
    parts: tuple[Part, ...]
    dtype: str
    tables_bytes: int
    extra_bytes: int  # weights that stand in more than one engine
    copied_bytes: int  # of the weights file beside the graphs: the simulator's, and while blocks are built into engines
    exists: bool  # fitting engines stand there already

    @property
    def peak_bytes(self) -> int:
        """Largest anonymous memory of the engines, built one after another; the simulator's graphs take none."""
        return max(part.expected_peak_bytes for part in self.parts)

    @property
    def disk_bytes(self) -> int:
        return sum(part.expected_engine_bytes for part in self.parts) + self.copied_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """Where the engines stand, and whether they were built now."""

    bundle: Path
    directory: Path
    record: EngineRecord
    built: bool


def preview(bundle: Path, options: BuildOptions) -> Preview:
    """What a build would make; writes nothing.

    Raises:
        BundleError, BackendError, ExportError: the bundle, library, GPU or sizes do not allow it.
    """
    manifest = open_bundle(bundle)
    plan = plan_build(manifest, options)  # before the library: what can never be built needs none
    return _preview(bundle, manifest, plan, options, load_library(options.backend))


def build_engines(
    bundle: Path,
    options: BuildOptions,
    *,
    progress: Progress = silent,
    on_ready: Callable[[Preview], None] = lambda seen: None,
    verify: Callable[[Path, Path, EngineRecord], Mapping[str, Any]] | None = None,
) -> BuildResult:
    """Build the engines that ``options`` ask for into ``bundle/engines/<key>/``, unless they stand there already.

    ``on_ready`` is told what will be built.
    ``verify`` is called with the bundle, the directory of the new engines and their record, before they take their place; what it
    returns stands in the record, and what it raises keeps them out.

    Raises:
        BundleError, BackendError, ExportError: in one line what is wrong.
        VerificationError: from ``verify``.
        KeyboardInterrupt: Ctrl-C.
        Whatever is raised, engines that stood there stand, and nothing of the new ones.
    """
    manifest = open_bundle(bundle)
    plan = plan_build(manifest, options)
    library = load_library(options.backend)
    seen = _preview(bundle, manifest, plan, options, library)
    if seen.exists and not options.force:
        return BuildResult(bundle=bundle, directory=seen.directory, record=read_record(seen.directory), built=False)
    if library.module is not None:
        check_memory(seen.peak_bytes, f"engines for {seen.target.label}")
    on_ready(seen)
    with one_line_disk_errors(seen.directory, again="build again", remedy=" and build again"):
        remove_all_leftovers(seen.directory.parent)  # gigabytes, of builds with other sizes too
        needed = seen.disk_bytes + DISK_SLACK_BYTES
        check_room(seen.directory, needed, what="the engines need up to", remedy="free some space there")
        with atomic_directory(seen.directory) as work:
            record = _build_all(work, manifest, seen, library, options, progress)
            _write(work, record)
            if verify is not None:
                record = replace(record, verification=dict(verify(bundle, work, record)))
                _write(work, record)
    return BuildResult(bundle=bundle, directory=seen.directory, record=record, built=True)


def _preview(bundle: Path, manifest: Manifest, plan: BuildPlan, options: BuildOptions, library: Library) -> Preview:
    target = target_of(library, options.compute_capability)
    oldest = oldest_capability(manifest)
    if target.compute_capability != ANY_GPU and not is_new_enough(target.compute_capability, oldest):
        raise BackendError(
            f"got {target.compute_capability}, weights in fp8 need {oldest} or later; leave it out for any such GPU, or export "
            "with --weights int4",
            param="compute_capability",
        )
    compiled = library.module is not None
    parts = _parts(bundle, manifest, plan, compiled=compiled)
    stored = [weights for part in parts for weights in stored_weights(part.graph.model).items()]
    graphs = [part.graph.model.graph.SerializeToString(deterministic=True) for part in parts]
    directory = engine_directory(bundle, engine_key(plan, target, manifest, graphs))
    return Preview(
        bundle=bundle,
        directory=directory,
        target=target,
        plan=plan,
        parts=parts,
        dtype=manifest.model.dtype,
        tables_bytes=sum(manifest.table_bytes(name) for name in {t for p in parts for t in p.graph.tables.values()}),
        extra_bytes=sum(length for _, length in stored) - sum(dict(stored).values()),
        copied_bytes=0 if compiled and not manifest.quantised else manifest.files[contract.WEIGHTS_FILE].bytes,
        exists=_stands(directory),
    )


def _parts(bundle: Path, manifest: Manifest, plan: BuildPlan, *, compiled: bool) -> tuple[Part, ...]:
    """The decoder graphs of the plan, and every graph of the bundle that holds no layers."""
    spec = graph_spec(bundle, manifest)
    decoders = [_decoder(engine_graph(spec, name, plan.capacity), plan, compiled=compiled) for name in plan.graphs]
    choices = [_choice(bundle, info, plan, compiled=compiled) for info in manifest.choice_graphs]
    return (*decoders, *choices)


def _decoder(graph: EngineGraph, plan: BuildPlan, *, compiled: bool) -> Part:
    return Part(
        graph=graph,
        profiles=profiles(plan, graph.name, graph.inputs),
        weight_bytes=sum(stored_weights(graph.model).values()),
        layers=len(graph.aliases) // 2,
        compiled=compiled,
    )


def _choice(bundle: Path, info: GraphInfo, plan: BuildPlan, *, compiled: bool) -> Part:
    graph = choice_graph(info, onnx.load(bundle / info.file, load_external_data=False))
    profile = choice_profile(plan, graph.inputs)
    return Part(graph=graph, profiles=(profile,), weight_bytes=0, layers=1, compiled=compiled)


def _stands(directory: Path) -> bool:
    """Whether whole engines with a record stand there; damaged ones are built again."""
    try:
        read_record(directory).check_files(directory, hashes=False)
    except BundleError:
        return False
    return True


def _write(work: Path, record: EngineRecord) -> None:
    (work / contract.ENGINE_RECORD_FILE).write_text(record.to_json(), encoding="utf-8")


def _build_all(
    work: Path, manifest: Manifest, seen: Preview, library: Library, options: BuildOptions, progress: Progress
) -> EngineRecord:
    started, peak, engines = time.perf_counter(), 0, []
    cache = options.timing_cache or cache_directory() / "timing" / f"{seen.target.label}.cache"
    copied = library.module is not None and bool(manifest.quantised)
    if copied:
        copy_weights(seen.bundle, work, manifest)
    for part in seen.parts:
        progress(part.graph.name, 0, 0)
        if library.module is None:
            engines.append(write_simulator_engine(work, part.graph, part.profiles))
            continue
        file = f"{part.graph.name}.engine"
        with tight_heap():
            built = build_engine(
                library,
                seen.target,
                part.graph,
                part.profiles,
                weights=(work if copied else seen.bundle) / contract.WEIGHTS_FILE,
                dtype=seen.dtype,
                output=work / file,
                timing_cache=cache,
                on_steps=functools.partial(progress, part.graph.name),
            )
        peak = max(peak, built.peak_bytes)
        engines.append(_engine_file(part, file, built))
        give_back()
    if copied:
        (work / contract.WEIGHTS_FILE).unlink()
    files = {} if library.module is not None else copy_companions(seen.bundle, work, manifest)
    facts = BuildFacts(
        seconds=round(time.perf_counter() - started, 3),
        peak_bytes=peak,
        tools={"dmtd": __version__, "onnx": metadata.version("onnx"), seen.target.backend: seen.target.version},
        machine=platform.platform(),
    )
    return _record(manifest, seen, options, tuple(engines), facts, files)


def _engine_file(part: Part, file: str, built: BuiltEngine) -> EngineFile:
    return EngineFile(
        graph=part.graph.name,
        file=file,
        bytes=built.bytes,
        sha256=built.sha256,
        weight_bytes=built.weight_bytes,
        scratch_bytes=built.scratch_bytes,
        peak_bytes=built.peak_bytes,
        seconds=built.seconds,
        tactics=built.tactics,
        inputs=part.graph.inputs,
        outputs=part.graph.outputs,
        tables=part.graph.tables,
        aliases=part.graph.aliases,
        profiles=part.profiles,
    )


def _record(
    manifest: Manifest,
    seen: Preview,
    options: BuildOptions,
    engines: tuple[EngineFile, ...],
    facts: BuildFacts,
    files: Mapping[str, FileInfo],
) -> EngineRecord:
    plan, target = seen.plan, seen.target
    return EngineRecord(
        schema=RECORD_SCHEMA,
        backend=target.backend,
        version=target.version,
        compute_capability=target.compute_capability,
        gpu_name=target.gpu_name,
        content_sha256=content_hash(manifest),
        dtype=manifest.model.dtype,
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        capacity=plan.capacity,
        prefill_chunk=plan.prefill_chunk,
        cycle_length=plan.cycle_length,
        sliced_limit=plan.sliced_limit,
        batch_buckets=plan.batch_buckets,
        length_buckets=plan.length_buckets,
        engines=engines,
        build_arguments=_arguments(plan, target, options),
        build=facts,
        files=files,
        supported=target.supported,
    )


def _arguments(plan: BuildPlan, target: Target, options: BuildOptions) -> str:
    words = [f"--backend {target.backend}"]
    if options.compute_capability is not None:
        words.append(f"--compute-capability {options.compute_capability}")
    if options.fused is not None:
        words.append("--fused" if options.fused else "--no-fused")
    words.append(f"--max-num-seqs {plan.max_num_seqs} --max-model-len {plan.max_model_len}")
    if plan.prefill_chunk != BuildOptions().prefill_chunk:
        words.append(f"--prefill-chunk {plan.prefill_chunk}")
    return " ".join(words)
