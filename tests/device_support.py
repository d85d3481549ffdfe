"""Engines of the simulator for tiny bundles, and backends over them: what the tests of the device runtime share."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.engines.backend import TensorRtBackend
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import EngineFile, EngineRecord, InputRange, ProfileInfo
from dmtd_runtime.bundle.manifest import CycleInfo, Manifest
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.device.base import Device
from dmtd_runtime.device.simulator.device import SimulatedDevice
from dmtd_runtime.sampling.grammar import Grammar
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import run_batch
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

Engines = tuple[Path, EngineRecord]


def simulator_engines(
    bundle: Path,
    *,
    fused: bool = False,
    max_num_seqs: int = 8,
    buckets: Sequence[int] = (),
    max_model_len: int | None = None,
) -> Engines:
    """Engines of the simulator; ``buckets``: lengths below the capacity, shorter than a build would make them.

    Those stand in a directory of their own, beside their record, which the simulator holds them to.
    """
    options = BuildOptions(backend="simulator", fused=fused, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    result = build_engines(bundle, options)
    if not buckets:
        return result.directory, result.record
    engines = tuple(_with_buckets(engine, buckets) for engine in result.record.engines)
    lengths = (*buckets, result.record.capacity)
    record = replace(result.record, length_buckets=lengths, sliced_limit=buckets[-1], engines=engines)
    directory = bundle / "engines_with_buckets" / "_".join((result.directory.name, *map(str, buckets)))
    shutil.copytree(result.directory, directory, dirs_exist_ok=True)
    (directory / contract.ENGINE_RECORD_FILE).write_text(record.to_json())
    return directory, record


def _with_buckets(engine: EngineFile, buckets: Sequence[int]) -> EngineFile:
    if engine.graph in contract.CHOICE_GRAPHS:
        return engine
    cut = [_seeing(profile, 1, buckets[-1]) for profile in engine.profiles if profile.whole]
    others = [profile if profile.whole else _seeing(profile, 1, profile.max_visible) for profile in engine.profiles]
    profiles = [replace(profile, index=index) for index, profile in enumerate((*cut, *others))]
    return replace(engine, profiles=tuple(profiles))


def _seeing(profile: ProfileInfo, least: int, most: int) -> ProfileInfo:
    rows = InputRange(min=(least,), opt=(most,), max=(most,))
    inputs = {**profile.inputs, contract.VISIBLE_ROWS: rows}
    return replace(profile, whole=False, min_visible=least, max_visible=most, inputs=inputs)


def engine_backend(
    bundle: Path,
    manifest: Manifest,
    engines: Engines,
    *,
    cycle: CycleInfo | None = None,
    slots: int = 1,
    graphs: bool = True,
    fused: bool = False,
    device: Device | None = None,
) -> TensorRtBackend:
    """A backend over engines on the simulator; ``cycle`` takes the place of the manifest's."""
    directory, record = engines
    options = BackendOptions(
        max_num_seqs=slots, cuda_graphs=graphs, threads=1, full_pass="fused" if fused else "staged"
    )
    if cycle is not None:
        manifest = replace(manifest, cycle=cycle)
    return TensorRtBackend(
        bundle, manifest, options, device=device or SimulatedDevice(), directory=directory, record=record
    )


def run_sequences(
    backend: TensorRtBackend,
    plan: CyclePlan,
    vocab_size: int,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    grammars: Mapping[int, Grammar] = MappingProxyType({}),
) -> list[list[TokenEvent]]:
    """Run prompts as one static batch with the product's sampler; seeds are the places in the batch, ``grammars`` by place."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    told: list[list[TokenEvent]] = [[] for _ in prompts]
    sequences = [
        SequenceRun(
            ids=list(ids),
            sampler=Sampler(
                p,
                vocab_size=vocab_size,
                prompt_ids=ids,
                seed=seed,
                form=grammars[seed].start() if seed in grammars else None,
            ),
            stops=StopRules(p),
            on_event=events.append,
            min_confidence=p.min_confidence,
        )
        for seed, (ids, p, events) in enumerate(zip(prompts, each, told, strict=True))
    ]
    run_batch(backend, plan, sequences)
    return told


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [event.choice.token_id for event in events if event.choice is not None]
