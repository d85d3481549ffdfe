"""The benchmark under load: sequences come to a worker as clients would send them, and go as they end.

Load (``load.py``) -> a worker in its own thread (``drive.py``) -> figures (``serve_report.py``). Plain and DMTD decoding take
turns over one open backend, on the same sequences. The limit is a static batch of DMTD: as many sequences of the load's mean
lengths as there are slots, all at once, which end together. Sequences are greedy and go on behind an end of sequence, so that
every mode has the same work. Every mode runs ``warmup`` times before it is measured, as one batch of all slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_errors.words import counted
from dmtd_runtime.backends.base import Backend, BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bench.conditions import conditions_of, load_average
from dmtd_runtime.bench.dataset import Dataset, read_dataset
from dmtd_runtime.bench.drive import LoadRun, drive
from dmtd_runtime.bench.load import (
    PROMPTS_PER_SLOT,
    LoadOptions,
    LoadRequest,
    arrival_times,
    draw_requests,
    length_range,
    with_long_prompts,
)
from dmtd_runtime.bench.measure import BenchOptions, OnRun, check_options, warmed
from dmtd_runtime.bench.run import run_once
from dmtd_runtime.bench.serve_report import LoadReport, ServeReport, load_report, rate_for_json
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import RequestError
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.text.tokenizer import Tokenizer

KINDS = ("plain", "dmtd", "static")


def run_serve(
    directory: Path,
    manifest: Manifest,
    options: BenchOptions,
    load: LoadOptions,
    backend_options: BackendOptions,
    serving: ServingOptions = ServingOptions(),
    *,
    on_run: OnRun = lambda label, done, total: None,
) -> ServeReport:
    """Measure a bundle under load; each of ``options.batches`` is a number of slots to be measured with.

    Raises:
        RequestError: lengths, numbers or a file that the bundle cannot run.
        BackendError: the device or library cannot be used.
    """
    source = check_load(directory, manifest, options, load, backend_options)
    options = warmed(options, backend_options)
    average, done, reports = load_average(), 0, []
    runs_each = len(KINDS) * (options.warmup + options.repeats)
    total = runs_each * len(options.batches) * len(load.request_rates)

    def tell(label: str) -> None:
        nonlocal done
        on_run(label, done, total)
        done += 1

    for slots in options.batches:
        backend = open_backend(directory, manifest, replace(backend_options, max_num_seqs=slots))
        try:
            bench = _Bench(
                backend=backend,
                manifest=manifest,
                options=options,
                load=load,
                serving=serving,
                requests=source(slots),
                tell=tell,
            )
            reports += [bench.measure(rate) for rate in load.request_rates]
            full_pass = backend.full_pass
        finally:
            backend.close()
    conditions = conditions_of(directory, manifest, replace(backend_options, full_pass=full_pass), average)
    return ServeReport(
        conditions=conditions | _asked(options, load, serving, source(max(options.batches))), loads=tuple(reports)
    )


Source = Callable[[int], tuple[LoadRequest, ...]]
"""The requests that are brought to so many slots."""


def check_load(
    directory: Path, manifest: Manifest, options: BenchOptions, load: LoadOptions, backend_options: BackendOptions
) -> Source:
    """Where the requests come from; RequestError for what the bundle cannot run."""
    if load.dataset is not None:
        options = replace(options, prompt_len=1)  # the file has its own
    check_options(options, manifest, backend_options)
    vocab, limit = manifest.model.vocab_size, backend_options.model_len(manifest.model.max_model_len)
    if load.long_prompts and load.long_prompt_len >= limit:
        raise RequestError(
            f"got {load.long_prompt_len}, expected at most {limit - 1}, one less than the model length; open with a larger "
            "max_model_len",
            param="long_prompt_len",
        )
    if load.dataset is not None:
        tokenizer = Tokenizer.from_directory(directory, model_vocab_size=vocab)
        found = read_dataset(
            load.dataset, tokenizer, vocab_size=vocab, max_model_len=limit, max_tokens=options.max_tokens
        )
        return lambda slots: _first(found, load)
    longest = sum(length_range(length, load.range_ratio)[1] for length in (options.prompt_len, options.max_tokens))
    if load.prefix_len + longest > limit:
        raise RequestError(
            f"got {options.prompt_len}, with a prefix of {load.prefix_len} and {options.max_tokens} new tokens, up to "
            f"{load.prefix_len + longest} with a range ratio of {load.range_ratio:g}, expected at most {limit}, the model "
            "length; lower one of them",
            param="prompt_len",
        )
    return lambda slots: draw_requests(
        load,
        load.num_prompts or PROMPTS_PER_SLOT * slots,
        prompt_len=options.prompt_len,
        max_tokens=options.max_tokens,
        vocab_size=vocab,
        seed=options.seed,
    )


def _first(found: Dataset, load: LoadOptions) -> tuple[LoadRequest, ...]:
    have = len(found.requests)
    if load.num_prompts is not None and load.num_prompts > have:
        raise RequestError(
            f"got {load.num_prompts}, expected at most {have}, the prompts of {load.dataset} that fit "
            f"({found.left_out} do not)",
            param="num_prompts",
        )
    return found.requests[: load.num_prompts]


def _asked(
    options: BenchOptions, load: LoadOptions, serving: ServingOptions, requests: Sequence[LoadRequest]
) -> dict[str, Any]:
    """What was asked for, ready for JSON; lengths are means of what was brought."""
    prompt_len, max_tokens = _mean_lengths(requests)
    return {
        "batches": list(options.batches),
        "request_rates": [rate_for_json(rate) for rate in load.request_rates],
        "concurrency": load.concurrency,
        "num_prompts": load.num_prompts,
        "range_ratio": load.range_ratio,
        "prefix_len": load.prefix_len,
        "long_prompts": load.long_prompts,
        "long_prompt_len": load.long_prompt_len,
        "dataset": None if load.dataset is None else str(load.dataset),
        "prompt_len": prompt_len,
        "max_tokens": max_tokens,
        "repeats": options.repeats,
        "warmup": options.warmup,
        "seed": options.seed,
        "serving": asdict(serving),
    }


def _mean_lengths(requests: Sequence[LoadRequest]) -> tuple[float, float]:
    return (
        float(np.mean([len(request.prompt_ids) for request in requests])),
        float(np.mean([request.max_tokens for request in requests])),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """One open backend, and what is brought to it."""

    backend: Backend
    manifest: Manifest
    options: BenchOptions
    load: LoadOptions
    serving: ServingOptions
    requests: tuple[LoadRequest, ...]
    tell: Callable[[str], None]

    def measure(self, rate: float) -> LoadReport:
        slots, closed = self.backend.slots, self.load.concurrency is not None
        name = f"{counted(slots, 'slot')}, " + ("closed loop" if closed else f"{rate:g}/s")
        for kind in KINDS * self.options.warmup:
            self.tell(f"{name}, {kind}, warm-up")
            self._static(self._plan(kind), warming=True)
        served: dict[str, list[LoadRun]] = {"plain": [], "dmtd": []}
        limits = []
        for turn in range(self.options.repeats):
            for kind in KINDS[:: -1 if turn % 2 else 1]:
                self.tell(f"{name}, {kind}")
                if kind == "static":
                    limits.append(self._static(self._plan(kind)))
                else:
                    served[kind].append(self._serve(self._plan(kind), rate))
        return load_report(
            slots=slots,
            request_rate=None if closed else rate,
            concurrency=self.load.concurrency,
            dmtd=served["dmtd"],
            plain=served["plain"],
            static_tok_per_s=limits,
        )

    def _plan(self, kind: str) -> CyclePlan:
        return CyclePlan(cycle=self.manifest.cycle, plain=kind == "plain")

    def _serve(self, plan: CyclePlan, rate: float) -> LoadRun:
        vocab, seed = self.manifest.model.vocab_size, self.options.seed
        requests = with_long_prompts(self.requests, self.load, self.backend.slots, vocab_size=vocab, seed=seed)
        return drive(
            self.backend,
            plan,
            requests,
            vocab_size=vocab,
            arrivals=None if math.isinf(rate) else arrival_times(rate, len(requests), self.options.seed),
            concurrency=self.load.concurrency,
            serving=self.serving,
        )

    def _static(self, plan: CyclePlan, *, warming: bool = False) -> float:
        """Generated tokens a second of a full batch that starts and ends together, its prompts included."""
        vocab = self.manifest.model.vocab_size
        prompt_len, max_tokens = map(round, _mean_lengths(self.requests))
        least = self.manifest.cycle.cycle_length + 2  # a cycle and a head
        max_tokens = max(least, min(max_tokens, 4 * least) if warming else max_tokens)
        prompt_len = max(1, min(prompt_len, self.backend.max_model_len - max_tokens))
        prompts = np.random.default_rng(self.options.seed).integers(0, vocab, (self.backend.slots, prompt_len))
        return run_once(self.backend, plan, prompts.tolist(), vocab, max_tokens).tok_per_s
