"""The benchmark: plain and DMTD decoding interleaved in one process, on the same prompts.

Both modes go through the product's own loop (``loop.run_batch`` with its greedy sampler), over one backend; only the
``CyclePlan`` differs. Where plain decoding has a graph of its own (``BackendOptions.plain``), it is measured over that. Prompts
are seeded random token ids, end-of-sequence ids are ignored, so that every run has the same steps. Repeats alternate the modes,
and alternate which one goes first, so that a machine that drifts treats both alike.

Decoding counts from the first step after the prompt to the last token. ``outside_share`` is the part of it that is spent
neither in ONNX Runtime nor in binding buffers for it. Draws nothing: ``cli/bench.py`` shows the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from dmtd_runtime.backends.base import Backend, BackendOptions, FullPass
from dmtd_runtime.backends.kv_cache import kv_bytes
from dmtd_runtime.backends.onnxruntime.limits import graph_slots, runs_plain_alone
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bench.conditions import conditions_of, load_average
from dmtd_runtime.bench.run import RunRecord, private_bytes, run_once
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.kernel_bound import kernel_bound
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.bundle.speed_bound import SplitBytes, mean_context, split_bytes
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import RequestError

SCHEMA = 1
SETTLED_S = 0.1  # between runs of two sessions: threads spin on for some hundredths of a second behind one
Mode = Literal["plain", "dmtd", "whole_model"]
OnRun = Callable[[str, int, int], None]
"""Told of every run before it starts: what it is, how many are done, how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure. ``whole_model`` adds plain decoding over one graph of the whole model, in a session of its own."""

    batches: tuple[int, ...] = (1,)
    prompt_len: int = 128
    max_tokens: int = 256
    repeats: int = 5
    warmup: int = 1
    seed: int = 0
    whole_model: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """The medians of one batch size; ``runs`` are the repeats behind them, in the order they ran.

    ``ratio`` is the median over pairs of repeats. ``ratio_of_steps`` is what the median times of single steps make of a
    cycle: bursts of other work on the machine move it less. Where whole cycles run in one go, they are timed, and not their
    steps; ``host_ms_per_cycle`` is how long a device then waited for the host. ``kernel_bound`` is None for floats,
    and for engines.
    """

    batch: int
    plain_tok_per_s: float
    dmtd_tok_per_s: float
    ratio: float
    bound: float
    ratio_of_bound: float
    kernel_bound: float | None
    ratio_of_kernel_bound: float | None
    ratio_of_steps: float | None
    outside_share: float
    plain_outside_share: float
    prefill_tok_per_s: float
    first_token_ms: float
    plain_step_ms: float | None
    full_pass_ms: float | None
    late_step_ms: float | None
    cycle_ms: float | None
    host_ms_per_cycle: float | None
    full_passes_per_token: float
    refill_rows: int
    plain_gb_per_s: float
    dmtd_gb_per_s: float
    kv_bytes: int
    kv_capacity_bytes: int
    private_bytes: int | None
    whole_model_tok_per_s: float | None
    plain_over_whole_model: float | None
    dmtd_over_whole_model: float | None
    ratios: tuple[float, ...]
    runs: dict[Mode, tuple[RunRecord, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Everything that was measured, under which conditions."""

    conditions: dict[str, Any]
    split: SplitBytes
    context: float
    batches: tuple[BatchReport, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object; the fields of the first batch size stand at the top as well."""
        first = dataclasses.asdict(self.batches[0])
        runs = first.pop("runs")
        return {
            "schema": SCHEMA,
            "conditions": self.conditions,
            "weight_bytes": self.split.stored,
            "fused_extra_bytes": self.split.fused_extra,
            "context": self.context,
            **first,
            "plain_tok_per_s_repeats": [run["decode_tok_per_s"] for run in runs["plain"]],
            "dmtd_tok_per_s_repeats": [run["decode_tok_per_s"] for run in runs["dmtd"]],
            "batches": [dataclasses.asdict(batch) for batch in self.batches],
        }


def run_bench(
    directory: Path,
    manifest: Manifest,
    options: BenchOptions,
    backend_options: BackendOptions,
    *,
    on_run: OnRun = lambda label, done, total: None,
) -> BenchReport:
    """Measure a bundle. ``backend_options.max_num_seqs`` is replaced by each batch size in turn.

    Raises:
        RequestError: lengths or batch sizes that the bundle cannot run.
        BackendError: the device or library cannot be used.
    """
    check_options(options, manifest, backend_options)
    options = warmed(options, backend_options)
    load = load_average()
    split = split_bytes(manifest)
    modes = 3 if options.whole_model else 2
    total, done = len(options.batches) * modes * (options.warmup + options.repeats), 0
    reports = []
    for batch in options.batches:
        report, full_pass = _bench_batch(
            directory,
            manifest,
            options,
            replace(backend_options, max_num_seqs=batch),
            split,
            _shifted(on_run, done, total),
        )
        reports.append(report)
        done += modes * (options.warmup + options.repeats)
    return BenchReport(
        conditions={
            **conditions_of(directory, manifest, replace(backend_options, full_pass=full_pass), load),
            **{name: value for name, value in dataclasses.asdict(options).items() if name != "whole_model"},
        },
        split=split,
        context=mean_context(options.prompt_len, options.max_tokens),
        batches=tuple(reports),
    )


def warmed(options: BenchOptions, backend_options: BackendOptions) -> BenchOptions:
    """With a warm-up where kernels are compiled or chosen when a shape first runs, whatever was asked for."""
    on_device = backend_options.runs_engines or backend_options.device == "cuda"
    return replace(options, warmup=max(1, options.warmup)) if on_device else options


def _shifted(on_run: OnRun, base: int, total: int) -> Callable[[str, int], None]:
    return lambda label, done: on_run(label, base + done, total)


def check_options(options: BenchOptions, manifest: Manifest, backend_options: BackendOptions) -> None:
    """Raise RequestError for lengths and batch sizes that the bundle cannot run; those of engines the backend checks itself."""
    if not options.batches or min(options.batches) < 1:
        got = min(options.batches, default="none")
        raise RequestError(f"got {got}, expected sizes of at least 1", param="batches")
    for name, least in (("prompt_len", 1), ("repeats", 1), ("warmup", 0)):
        if (value := getattr(options, name)) < least:
            raise RequestError(f"got {value}, expected at least {least}", param=name)
    cycle = manifest.cycle.cycle_length
    if options.max_tokens < cycle + 2:
        raise RequestError(
            f"got {options.max_tokens}, expected at least {cycle + 2}, a cycle and a head", param="max_tokens"
        )
    limit = backend_options.model_len(manifest.model.max_model_len)
    standard = (backend_options.dialect or manifest.default_dialect) == contract.STANDARD
    if backend_options.backend == "onnxruntime" and backend_options.device == "cuda" and standard:
        raise RequestError(
            "got standard with the device cuda: its attention copies whole caches for every head in each step, which "
            "hides what DMTD saves; measure a bundle with the onnxruntime dialect (dmtd export --dtype bfloat16)",
            param="dialect",
        )
    if not standard and not backend_options.runs_engines:
        graph_slots(manifest, replace(backend_options, max_num_seqs=max(options.batches)))
    if options.prompt_len + options.max_tokens > limit:
        raise RequestError(
            f"got {options.prompt_len}, and {options.max_tokens} new tokens, expected at most {limit} together, the model "
            "length; lower one of them",
            param="prompt_len",
        )


def _bench_batch(
    directory: Path,
    manifest: Manifest,
    options: BenchOptions,
    backend_options: BackendOptions,
    split: SplitBytes,
    on_run: Callable[[str, int], None],
) -> tuple[BatchReport, FullPass | None]:
    """What was measured, and how the backend ran full passes."""
    batch, done = backend_options.max_num_seqs, 0
    generator = np.random.default_rng(options.seed)
    vocab = manifest.model.vocab_size
    prompts = generator.integers(0, vocab, (batch, options.prompt_len)).tolist()
    records: dict[Mode, list[RunRecord]] = {"plain": [], "dmtd": []}
    with contextlib.ExitStack() as opened:

        def open_one(wanted: BackendOptions) -> Backend:
            backend = open_backend(directory, manifest, wanted)
            opened.callback(backend.close)
            return backend

        def run(mode: Mode, phase: str) -> RunRecord:
            nonlocal done
            on_run(f"batch {batch}, {mode.replace('_', ' ')}{phase}", done)
            done += 1
            if len(set(map(id, backends.values()))) > 1:
                time.sleep(SETTLED_S)
            return run_once(
                backends[mode],
                CyclePlan(cycle=manifest.cycle, plain=mode != "dmtd"),
                prompts,
                vocab,
                options.max_tokens,
            )

        shared = open_one(backend_options)
        backends: dict[Mode, Backend] = {"plain": shared, "dmtd": shared}
        plain_alone = replace(backend_options, plain=True)
        packed = (backend_options.dialect or manifest.default_dialect) == contract.ONNXRUNTIME
        alone = not backend_options.runs_engines and runs_plain_alone(plain_alone, packed=packed)
        for mode in [mode for mode in backends if mode == "dmtd" or not alone] * options.warmup:
            run(mode, ", warm-up")
        private = private_bytes()
        if alone:  # opened only now, as below: memory is told of the bundle's way of running
            backends["plain"] = open_one(plain_alone)
        if options.whole_model:
            fused = replace(backend_options, full_pass="fused", plain=True)
            backends["whole_model"] = backends["plain"] if alone else open_one(fused)
            records["whole_model"] = []
        for mode in [mode for mode, backend in backends.items() if backend is not shared] * options.warmup:
            run(mode, ", warm-up")
        for turn in range(options.repeats):
            for mode in list(backends)[:: -1 if turn % 2 else 1]:
                records[mode].append(run(mode, ""))
        capacity = kv_bytes(manifest.model, shared.capacity) * batch
    gc.collect()  # the next batch size opens sessions of its own
    return _summary(manifest, options, backend_options, split, records, private, capacity), shared.full_pass


def _summary(
    manifest: Manifest,
    options: BenchOptions,
    backend_options: BackendOptions,
    split: SplitBytes,
    records: dict[Mode, list[RunRecord]],
    private: int | None,
    capacity_bytes: int,
) -> BatchReport:
    batch = backend_options.max_num_seqs
    plain, dmtd, whole = records["plain"], records["dmtd"], records.get("whole_model")
    ratios = [ours.decode_tok_per_s / theirs.decode_tok_per_s for ours, theirs in zip(dmtd, plain, strict=True)]
    context = mean_context(options.prompt_len, options.max_tokens)
    rates = {mode: median(run.decode_tok_per_s for run in runs) for mode, runs in records.items()}
    ratio, bound = median(ratios), split.bound(context, batch)
    by_kernels = None if backend_options.runs_engines else kernel_bound(manifest, context, batch)
    late = [run.late_step_ms for run in dmtd if run.late_step_ms is not None]
    plain_ms, full_ms = (_median([run.full_pass_ms for run in runs]) for runs in (plain, dmtd))
    cycle_ms, plain_cycle_ms = (_median([run.cycle_ms for run in runs]) for runs in (dmtd, plain))
    late_ms = median(late) if late else None
    steps = dmtd[0].full_passes + dmtd[0].late_steps
    tau = manifest.cycle.cycle_length
    return BatchReport(
        batch=batch,
        plain_tok_per_s=rates["plain"],
        dmtd_tok_per_s=rates["dmtd"],
        ratio=ratio,
        bound=bound,
        ratio_of_bound=ratio / bound,
        kernel_bound=by_kernels,
        ratio_of_kernel_bound=None if by_kernels is None else ratio / by_kernels,
        ratio_of_steps=_ratio_of_steps(tau, plain_ms, full_ms, late_ms, plain_cycle_ms, cycle_ms),
        outside_share=median(run.outside_share for run in dmtd),
        plain_outside_share=median(run.outside_share for run in plain),
        prefill_tok_per_s=median(run.prefill_tok_per_s for run in dmtd),
        first_token_ms=median(run.first_token_ms for run in dmtd),
        plain_step_ms=plain_ms if plain_cycle_ms is None else plain_cycle_ms / tau,
        full_pass_ms=full_ms,
        late_step_ms=late_ms,
        cycle_ms=cycle_ms,
        host_ms_per_cycle=_median([run.host_ms_per_cycle for run in dmtd]),
        full_passes_per_token=dmtd[0].full_passes / steps,
        refill_rows=dmtd[0].refill_rows,
        plain_gb_per_s=split.plain_step(context, batch) / batch * rates["plain"] / 1e9,
        dmtd_gb_per_s=split.cycle(context, batch) / tau / batch * rates["dmtd"] / 1e9,
        kv_bytes=kv_bytes(manifest.model, options.prompt_len + options.max_tokens - 1) * batch,
        kv_capacity_bytes=capacity_bytes,
        private_bytes=private,
        whole_model_tok_per_s=rates.get("whole_model"),
        plain_over_whole_model=_median_ratio(plain, whole),
        dmtd_over_whole_model=_median_ratio(dmtd, whole),
        ratios=tuple(ratios),
        runs={mode: tuple(runs) for mode, runs in records.items()},
    )


def _median_ratio(ours: Sequence[RunRecord], theirs: Sequence[RunRecord] | None) -> float | None:
    if not theirs:
        return None
    return median(mine.decode_tok_per_s / other.decode_tok_per_s for mine, other in zip(ours, theirs, strict=True))


def _median(values: Sequence[float | None]) -> float | None:
    """Of the values that were measured."""
    measured = [value for value in values if value is not None]
    return median(measured) if measured else None


def _ratio_of_steps(
    tau: int,
    plain_ms: float | None,
    full_ms: float | None,
    late_ms: float | None,
    plain_cycle_ms: float | None,
    cycle_ms: float | None,
) -> float | None:
    """How much faster the median cycle is than as many plain steps, whatever lies between them."""
    if plain_cycle_ms is None and plain_ms is not None:
        plain_cycle_ms = tau * plain_ms
    if cycle_ms is None and full_ms is not None:
        cycle_ms = full_ms + (tau - 1) * (late_ms or 0.0)
    return None if cycle_ms is None or plain_cycle_ms is None else plain_cycle_ms / cycle_ms
