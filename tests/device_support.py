"""Engines of the host flavour for tiny bundles, and backends over them: what the tests of the device runtime share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx

from dmtd_export.build.engine_graph import engine_graph
from dmtd_runtime import contract
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.tensorrt import TensorRtBackend
from dmtd_runtime.device.host import HostDevice
from dmtd_runtime.engine_record import (
    BuildFacts,
    EngineFile,
    EngineRecord,
    InputRange,
    ProfileInfo,
    content_hash,
)
from dmtd_runtime.manifest import Manifest, sha256_of

STAGED = (contract.THINKING, contract.LATE_DECODE)


def make_engines(
    bundle: Path,
    manifest: Manifest,
    *,
    graphs: Sequence[contract.GraphName] = STAGED,
    max_batch: int = 8,
    capacity: int | None = None,
    length_buckets: Sequence[int] = (),
    prefill_chunk: int = 256,
) -> tuple[Path, EngineRecord]:
    """Write engine graphs as the host flavour holds them, and their record."""
    key = f"host-{'-'.join(graphs)}-{capacity}-{'-'.join(map(str, length_buckets))}"
    directory = bundle / contract.ENGINES_DIRECTORY / key
    capacity = capacity or manifest.model.max_model_len + manifest.model.max_window
    buckets = tuple(sorted({*length_buckets, capacity}))
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle / contract.WEIGHTS_FILE, directory / contract.WEIGHTS_FILE)
    engines = []
    for name in (*graphs, *contract.CHOICE_GRAPHS):
        path = directory / f"{name}.onnx"
        if name in contract.CHOICE_GRAPHS:
            info = manifest.graph(name, contract.STANDARD)
            shutil.copyfile(bundle / info.file, path)
            inputs, outputs, tables, aliases = info.inputs, info.outputs, {}, {}
        else:
            graph = engine_graph(bundle, manifest, name, capacity)
            onnx.save_model(graph.model, path)
            inputs, outputs, tables, aliases = graph.inputs, graph.outputs, graph.tables, graph.aliases
        engines.append(
            EngineFile(
                graph=name,
                file=path.name,
                bytes=path.stat().st_size,
                sha256=sha256_of(path),
                weight_bytes=0,
                scratch_bytes=None,
                inputs=inputs,
                outputs=outputs,
                tables=tables,
                aliases=aliases,
                profiles=_profiles(name, manifest.cycle.cycle_length, buckets, max_batch, prefill_chunk),
            )
        )
    record = EngineRecord(
        schema=1,
        flavour="host",
        version="0",
        compute_capability="any",
        gpu_name=None,
        content_sha256=content_hash(manifest, graphs),
        dtype=manifest.model.dtype,
        full_pass="fused" if contract.FULL_PASS in graphs else "staged",
        max_batch=max_batch,
        max_model_len=capacity - manifest.model.max_window,
        capacity=capacity,
        prefill_chunk=prefill_chunk,
        cycle_length=manifest.cycle.cycle_length,
        sliced_limit=buckets[-2] if len(buckets) > 1 else 0,
        batch_buckets=tuple(size for size in (1, 2, 4, 8) if size <= max_batch),
        length_buckets=buckets,
        engines=tuple(engines),
        rebuild="dmtd build BUNDLE",
        build=BuildFacts(seconds=0.0, peak_bytes=0, tools={}),
    )
    (directory / contract.ENGINE_RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
    return directory, record


def _profiles(
    name: contract.GraphName, tau: int, buckets: Sequence[int], max_batch: int, chunk: int
) -> tuple[ProfileInfo, ...]:
    kinds = [("prefill", chunk), ("step", 1) if name == contract.LATE_DECODE else ("refill", max(tau, 8))]
    if name in contract.CHOICE_GRAPHS:
        kinds = [("step", 1)]
    bounds = [(True, buckets[-1], buckets[-1])]
    if len(buckets) > 1:
        bounds.insert(0, (False, 1, buckets[-2]))
    made = []
    for kind, rows in kinds:
        for whole, low, high in bounds:
            ids = InputRange(min=(1, 1), opt=(1, rows), max=(max_batch, rows))
            made.append(
                ProfileInfo(
                    index=len(made),
                    kind=kind,
                    whole=whole,
                    max_rows=rows,
                    min_visible=low,
                    max_visible=high,
                    inputs={contract.INPUT_IDS: ids},
                )
            )
    return tuple(made)


def host_backend(
    bundle: Path,
    manifest: Manifest,
    engines: tuple[Path, EngineRecord],
    *,
    slots: int = 1,
    graphs: bool = True,
    device: HostDevice | None = None,
    max_model_len: int | None = None,
) -> TensorRtBackend:
    directory, record = engines
    options = BackendOptions(max_batch=slots, cuda_graphs=graphs, threads=1, max_model_len=max_model_len)
    return TensorRtBackend(bundle, manifest, options, device=device or HostDevice(), directory=directory, record=record)
