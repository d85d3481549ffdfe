"""The benchmark under load on a tiny bundle: what it counts is known beforehand, what it times only has to be sensible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle
from device_support import engine_backend, simulator_engines

from dmtd_runtime.backends.base import Backend, BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bench.drive import LoadRun, SequenceRecord, drive
from dmtd_runtime.bench.load import LoadOptions, LoadRequest, draw_requests
from dmtd_runtime.bench.measure import BenchOptions
from dmtd_runtime.bench.serve import run_serve
from dmtd_runtime.bench.serve_report import (
    ServeReport,
    figures_of,
    latency,
    load_report,
    loaded_tok_per_s,
    undisturbed_cycles,
)
from dmtd_runtime.bundle.manifest import Manifest, load_manifest
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import BackendError, RequestError
from dmtd_runtime.serving.counts import Counts
from dmtd_runtime.serving.options import ServingOptions

TAU = 3
LOAD = LoadOptions(request_rates=(400.0, float("inf")), num_prompts=5)
OPTIONS = BenchOptions(batches=(1, 2), prompt_len=8, max_tokens=10, repeats=2, warmup=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


@pytest.fixture(scope="module")
def backend(bundle: Path, manifest: Manifest) -> Iterator[Backend]:
    opened = open_backend(bundle, manifest, BackendOptions(threads=1, max_num_seqs=2))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def report(bundle: Path, manifest: Manifest, told: list[tuple[str, int, int]]) -> ServeReport:
    options = BackendOptions(threads=1)
    return run_serve(bundle, manifest, OPTIONS, LOAD, options, on_run=lambda *each: told.append(each))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"concurrency": 1}, {"concurrency": 4}, {"arrivals": [0.0, 0.002, 0.004] * 3}]
)
def test_every_sequence_gets_its_tokens(
    settings: dict[str, object], plain: bool, backend: Backend, manifest: Manifest
) -> None:
    vocab = manifest.model.vocab_size
    requests = draw_requests(LoadOptions(), 9, prompt_len=20, max_tokens=9, vocab_size=vocab, seed=1)
    plan = CyclePlan(cycle=manifest.cycle, plain=plain)
    run = drive(backend, plan, requests, vocab_size=vocab, **settings)  # type: ignore[arg-type]
    assert [(s.prompt_len, len(s.token_s)) for s in run.sequences] == [
        (len(r.prompt_ids), r.max_tokens) for r in requests
    ]
    for one in run.sequences:
        assert 0 <= one.submitted_s <= one.started_s <= one.token_s[0]
        assert list(one.token_s) == sorted(one.token_s)
    counts = run.counts
    assert (counts.running, counts.waiting) == (0, 0)
    assert counts.generation_tokens == sum(r.max_tokens for r in requests)
    assert counts.prompt_tokens == sum(len(r.prompt_ids) for r in requests)
    assert counts.step_tokens_sum == counts.prompt_tokens + sum(r.max_tokens - 1 for r in requests)
    assert 0 < run.session_seconds < max(one.token_s[-1] for one in run.sequences)
    if settings.get("concurrency") == 1:
        # Alone, a sequence of n tokens has a head for every tau of the n - 1 behind the prompt's.
        tau = 1 if plain else TAU
        assert counts.head_passes == sum(-(-(r.max_tokens - 1) // tau) for r in requests)
        assert counts.full_passes == counts.head_passes + counts.prefill_passes
        for before, after in zip(run.sequences, run.sequences[1:], strict=False):
            assert after.submitted_s >= before.token_s[-1]


def test_whole_cycles_of_engines(bundle: Path, manifest: Manifest) -> None:
    """Tokens of a cycle come together, and every sequence gets all of its own."""
    engines = engine_backend(bundle, manifest, simulator_engines(bundle, max_num_seqs=2), slots=2)
    vocab = manifest.model.vocab_size
    requests = draw_requests(LoadOptions(), 4, prompt_len=8, max_tokens=9, vocab_size=vocab, seed=1)
    try:
        run = drive(engines, CyclePlan(cycle=manifest.cycle), requests, vocab_size=vocab, concurrency=3)
    finally:
        engines.close()
    assert [len(one.token_s) for one in run.sequences] == [r.max_tokens for r in requests]
    assert engines.stats.cycles > 0
    assert run.counts.generation_tokens == sum(r.max_tokens for r in requests)
    # Cycles go on behind the end of a sequence: those tokens went through a step too.
    assert run.counts.step_tokens_sum >= run.counts.prompt_tokens + sum(r.max_tokens - 1 for r in requests)
    assert sum(run.counts.step_tokens) == run.counts.prefill_passes + manifest.cycle.cycle_length * engines.stats.cycles


def test_a_shared_prefix_is_found_again(backend: Backend, manifest: Manifest) -> None:
    requests = [LoadRequest(prompt_ids=(*range(1, 65), 70 + i), max_tokens=5) for i in range(3)]
    plan = CyclePlan(cycle=manifest.cycle)
    run = drive(backend, plan, requests, vocab_size=manifest.model.vocab_size, concurrency=1)
    first, *later = (one.cached_tokens for one in run.sequences)
    assert first == 0 and all(cached > 0 for cached in later)
    assert run.counts.prefix_hits == sum(later)
    assert figures_of([run]).prefix_hit_share == sum(later) / (3 * 65)
    without = ServingOptions(prefix_cache_bytes=0)
    run = drive(backend, plan, requests, vocab_size=manifest.model.vocab_size, concurrency=1, serving=without)
    assert figures_of([run]).prefix_hit_share == 0


def test_a_backend_that_fails_ends_the_load(
    backend: Backend, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BackendError("no more")

    monkeypatch.setattr(backend, "run", fail)
    requests = [LoadRequest(prompt_ids=(1, 2), max_tokens=5)] * 3
    with pytest.raises(BackendError, match="no more"):
        drive(backend, CyclePlan(cycle=manifest.cycle), requests, vocab_size=manifest.model.vocab_size)


def a_sequence(submitted: float, started: float, *token_s: float, passes: int = 0) -> SequenceRecord:
    return SequenceRecord(
        prompt_len=10, cached_tokens=5, submitted_s=submitted, started_s=started, token_s=token_s, full_passes=passes
    )


def a_run(*sequences: SequenceRecord, session_seconds: float = 1.0, backend_seconds: float = 1.0) -> LoadRun:
    counts = Counts(head_passes=8, head_passes_in_phase=6)
    return LoadRun(
        cycle_length=2,
        sequences=sequences,
        counts=counts,
        session_seconds=session_seconds,
        backend_seconds=backend_seconds,
    )


def test_figures_by_hand() -> None:
    run = a_run(
        a_sequence(0.0, 0.0, 1.0, 1.25, 1.5, passes=1),
        a_sequence(0.5, 1.5, 2.0, 2.5, 3.0, 4.0, passes=2),  # waited until the first one had ended
        a_sequence(6.0, 6.0, 7.0, 8.0, passes=1),  # and nobody was there from 4 to 6
        session_seconds=5.4,
        backend_seconds=5.7,
    )
    found = figures_of([run])
    assert (found.requests, found.duration_s, found.requests_per_s) == (3, 8.0, 3 / 8)
    assert (found.output_tok_per_s, found.total_tok_per_s) == (9 / 8, 39 / 8)
    assert found.loaded_tok_per_s == 7 / 6  # until the third got its slot
    assert (found.ttft_ms.p50, found.ttft_ms.max) == (1000.0, 1500.0)
    assert found.itl_ms is not None and found.itl_ms.max == 1000.0
    assert found.e2e_ms.p50 == 2000.0
    assert found.full_passes_per_token == 4 / 6
    # Of two tokens a cycle: 0.5, 1 and 1.5 s, none of them while the prompts of 0 to 1, 1.5 to 2 and 6 to 7 were read.
    assert found.longest_gap_cycles == 1.0 / 1.0
    assert found.in_phase_share == 0.75
    assert found.outside_share == pytest.approx(1 - 5.4 / 6)
    assert found.loop_share == pytest.approx(1 - 5.7 / 6)
    assert found.running == (1.5 + 2.5 + 2.0) / 6
    assert found.prefix_hit_share == 0.5
    twice = figures_of([run, run])
    assert (twice.requests, twice.duration_s, twice.loaded_tok_per_s) == (6, 16.0, 7 / 6)
    assert (twice.ttft_ms.p50, twice.ttft_ms.max) == (1000.0, 1500.0)


def test_cycles_beside_a_prompt_are_no_measure_of_those_without() -> None:
    stream = a_sequence(0.0, 0.0, 1.0, 1.5, 2.0, 5.0, 8.0, 8.5, 9.0, 9.5)
    long = a_sequence(0.0, 2.0, 8.0)
    found = figures_of([a_run(stream, long)])
    assert undisturbed_cycles(a_run(stream, long)) == [1.0, 1.0, 1.0]  # from 1 to 2, from 8 and from 8.5
    assert found.longest_gap_cycles == 3.0
    assert figures_of([a_run(a_sequence(0.0, 0.0, 1.0, 2.0), long)]).longest_gap_cycles is None


def test_a_load_that_never_waits_counts_to_its_end() -> None:
    assert loaded_tok_per_s([a_run(a_sequence(0.0, 0.0, 1.0, 2.0), a_sequence(0.0, 0.0, 3.0, 4.0))]) == 1.0
    single = figures_of([a_run(a_sequence(0.0, 0.0, 2.0))])
    assert (single.itl_ms, single.full_passes_per_token, single.loaded_tok_per_s) == (None, None, 0.5)


def test_percentiles_are_numpys() -> None:
    seconds = np.random.default_rng(3).exponential(0.02, 313)
    found = latency(seconds.tolist())
    assert [found.p50, found.p90, found.p99, found.max] == pytest.approx(
        [1e3 * np.quantile(seconds, q) for q in (0.5, 0.9, 0.99, 1.0)]
    )


def test_ratios_are_medians_over_pairs() -> None:
    slow, fast = (a_run(a_sequence(0.0, 0.0, at, 2 * at)) for at in (1.0, 0.25))  # 1 and 4 tokens a second
    found = load_report(
        slots=1,
        request_rate=None,
        concurrency=1,
        dmtd=[fast, fast, slow],
        plain=[slow, fast, slow],
        static_tok_per_s=[8.0, 5.0, 2.0],
    )
    assert (found.ratios, found.ratio) == ((4.0, 1.0, 1.0), 1.0)
    assert (found.ratios_of_static, found.ratio_of_static) == ((0.5, 0.8, 0.5), 0.5)
    assert found.static_tok_per_s == 5.0


def test_loads_and_runs(report: ServeReport, told: list[tuple[str, int, int]]) -> None:
    assert [(load.slots, load.request_rate) for load in report.loads] == [
        (slots, rate) for slots in (1, 2) for rate in LOAD.request_rates
    ]
    for load in report.loads:
        assert len(load.ratios) == len(load.ratios_of_static) == 2
        for mode in (load.dmtd, load.plain):
            assert mode.requests == 2 * 5
            assert mode.ttft_ms.p50 <= mode.e2e_ms.p50
            assert 0 < mode.loop_share < mode.outside_share < 1 and 0 < mode.running <= load.slots
        assert load.plain.full_passes_per_token is not None and load.dmtd.full_passes_per_token is not None
        assert 1 / TAU <= load.dmtd.full_passes_per_token < load.plain.full_passes_per_token
    kinds = [label.split(", ")[2:] for label, _, _ in told[:9]]
    assert kinds == [
        *(["plain", "warm-up"], ["dmtd", "warm-up"], ["static", "warm-up"]),
        *(["plain"], ["dmtd"], ["static"], ["static"], ["dmtd"], ["plain"]),
    ]
    assert [(done, total) for _, done, total in told] == [(done, 36) for done in range(36)]


def test_json_has_what_readers_rely_on(report: ServeReport) -> None:
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert set(told) == {"schema", "conditions", "loads"}
    latencies = {"p50", "p90", "p99", "max"}
    for load in told["loads"]:
        assert set(load) >= {"slots", "request_rate", "concurrency", "static_tok_per_s", "ratio", "ratio_of_static"}
        for mode in (load["dmtd"], load["plain"]):
            assert set(mode["ttft_ms"]) == set(mode["itl_ms"]) == set(mode["e2e_ms"]) == latencies
            for name in (
                *("requests_per_s", "output_tok_per_s", "total_tok_per_s", "loaded_tok_per_s"),
                *(
                    "full_passes_per_token",
                    "in_phase_share",
                    "outside_share",
                    "loop_share",
                    "prefix_hit_share",
                    "running",
                ),
            ):
                assert isinstance(mode[name], float)
    assert [load["request_rate"] for load in told["loads"]] == [400.0, "inf"] * 2
    conditions = told["conditions"]
    assert conditions["cpu"] and conditions["request_rates"] == [400.0, "inf"]
    assert (conditions["batches"], conditions["num_prompts"], conditions["split"]) == ([1, 2], 5, [0, 3, 2])


def test_prompts_of_a_file(bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": [1, 2, 3], "max_tokens": 6}, {"prompt": [5] * 9, "max_tokens": 8}, {"prompt": [1] * 300}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    options = BenchOptions(batches=(2,), repeats=1, warmup=0, prompt_len=250, max_tokens=7)
    found = run_serve(bundle, manifest, options, LoadOptions(dataset=path), BackendOptions(threads=1))
    assert found.loads[0].dmtd.requests == 2
    assert (found.conditions["prompt_len"], found.conditions["max_tokens"]) == (6.0, 7.0)
    too_many = LoadOptions(dataset=path, num_prompts=3)
    with pytest.raises(RequestError, match=r"num_prompts: got 3, expected at most 2.* \(1 do not\)"):
        run_serve(bundle, manifest, options, too_many, BackendOptions(threads=1))


def test_long_prompts_come_while_others_decode(bundle: Path, manifest: Manifest) -> None:
    options = BenchOptions(batches=(2,), repeats=1, warmup=0, prompt_len=4, max_tokens=60)
    load = LoadOptions(num_prompts=4, range_ratio=0, long_prompts=2, long_prompt_len=150)
    found = run_serve(bundle, manifest, options, load, BackendOptions(threads=1)).loads[0]
    for mode in (found.dmtd, found.plain):
        assert mode.requests == 4 + 2
        assert mode.longest_gap_cycles is not None and mode.longest_gap_cycles > 0
    with pytest.raises(RequestError, match="long_prompt_len: got 9000, expected at most"):
        run_serve(bundle, manifest, options, replace(load, long_prompt_len=9000), BackendOptions(threads=1))


def test_lengths_beyond_the_model_are_refused(bundle: Path, manifest: Manifest) -> None:
    options = BenchOptions(prompt_len=100, max_tokens=80)
    with pytest.raises(RequestError, match="prompt_len: got 100, with a prefix of 0 and 80 new tokens, up to 270"):
        run_serve(bundle, manifest, options, LoadOptions(), BackendOptions(threads=1))
