"""The benchmark on a tiny bundle: what it counts is known beforehand, what it times only has to be sensible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle

from dmtd_runtime.backends.base import Backend, BackendOptions
from dmtd_runtime.bench.measure import BenchOptions, BenchReport, run_bench
from dmtd_runtime.bench.run import RunRecord, run_once
from dmtd_runtime.bundle.manifest import Manifest, load_manifest
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import RequestError

OPTIONS = BenchOptions(batches=(1, 2), prompt_len=7, max_tokens=11, repeats=3, warmup=1, whole_model=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


@pytest.fixture(scope="module")
def runs() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def report(bundle: Path, manifest: Manifest, runs: list[tuple[str, int, int]]) -> BenchReport:
    return run_bench(bundle, manifest, OPTIONS, BackendOptions(threads=1), on_run=lambda *told: runs.append(told))


def test_counts_of_steps(report: BenchReport) -> None:
    # 11 tokens: one comes from the prompt, ten from steps; with cycles of 3 the heads are steps 0, 3, 6, 9.
    for batch in report.batches:
        assert all((run.full_passes, run.late_steps) == (4, 6) for run in batch.runs["dmtd"])
        assert all(run.refill_rows == 3 * 2 * batch.batch for run in batch.runs["dmtd"])
        for mode in ("plain", "whole_model"):
            assert all((run.full_passes, run.late_steps, run.refill_rows) == (10, 0, 0) for run in batch.runs[mode])
        assert batch.full_passes_per_token == 0.4
        assert batch.refill_rows == 6 * batch.batch


def test_every_repeat_is_kept_and_no_warm_up(report: BenchReport, runs: list[tuple[str, int, int]]) -> None:
    for batch in report.batches:
        assert {mode: len(kept) for mode, kept in batch.runs.items()} == {"plain": 3, "dmtd": 3, "whole_model": 3}
        assert len(batch.ratios) == 3
    assert [done for _, done, _ in runs] == list(range(24))
    assert {total for _, _, total in runs} == {24}


def test_modes_alternate(report: BenchReport, runs: list[tuple[str, int, int]]) -> None:
    measured = [label for label, _, _ in runs if label.startswith("batch 1") and "warm-up" not in label]
    modes = [label.split(", ")[1] for label in measured]
    assert modes == [
        *("plain", "dmtd", "whole model"),
        *("whole model", "dmtd", "plain"),
        *("plain", "dmtd", "whole model"),
    ]


def test_each_mode_runs_as_the_product_runs_it(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain decoding of one sequence has a graph of its own; compared with its slower way DMTD would gain more than it does."""
    seen: dict[tuple[int, bool], set[str | None]] = {}

    def noted(backend: Backend, plan: CyclePlan, prompts: Sequence[Sequence[int]], *rest: Any) -> RunRecord:
        seen.setdefault((len(prompts), plan.plain), set()).add(backend.full_pass)
        return run_once(backend, plan, prompts, *rest)

    monkeypatch.setattr("dmtd_runtime.bench.measure.run_once", noted)
    run_bench(bundle, manifest, replace(OPTIONS, whole_model=False), BackendOptions(threads=1))
    assert seen == {(1, True): {"fused"}, (1, False): {None}, (2, True): {None}, (2, False): {None}}


def test_medians_belong_to_their_repeats(report: BenchReport) -> None:
    for batch in report.batches:
        plain = sorted(run.decode_tok_per_s for run in batch.runs["plain"])
        dmtd = sorted(run.decode_tok_per_s for run in batch.runs["dmtd"])
        assert batch.plain_tok_per_s == plain[1]
        assert batch.dmtd_tok_per_s == dmtd[1]
        pairs = zip(batch.runs["dmtd"], batch.runs["plain"], strict=True)
        assert batch.ratio == sorted(ours.decode_tok_per_s / theirs.decode_tok_per_s for ours, theirs in pairs)[1]
        for mode, found in (("plain", batch.plain_over_whole_model), ("dmtd", batch.dmtd_over_whole_model)):
            whole = zip(batch.runs[mode], batch.runs["whole_model"], strict=True)
            assert found == sorted(ours.decode_tok_per_s / theirs.decode_tok_per_s for ours, theirs in whole)[1]
        assert batch.ratio_of_bound == batch.ratio / batch.bound
        assert 0 < batch.outside_share < 1
        # A cycle of 3, which runs in one go, against three plain steps.
        assert (batch.full_pass_ms, batch.late_step_ms) == (None, None)
        assert batch.cycle_ms is not None and batch.host_ms_per_cycle is None
        assert batch.ratio_of_steps == pytest.approx(3 * batch.plain_step_ms / batch.cycle_ms)


def test_steps_are_timed_where_they_run_one_by_one(bundle: Path, manifest: Manifest) -> None:
    report = run_bench(bundle, manifest, OPTIONS, BackendOptions(threads=1, full_pass="staged"))
    for batch in report.batches:
        assert batch.late_step_ms is not None and batch.full_pass_ms is not None and batch.cycle_ms is None
        cycle_ms = batch.full_pass_ms + 2 * batch.late_step_ms
        assert batch.ratio_of_steps == pytest.approx(3 * batch.plain_step_ms / cycle_ms)


def test_memory_of_the_caches(report: BenchReport) -> None:
    # A row of one layer: key and value of 2 heads of 16 float32. The last token is never fed.
    row = 5 * 2 * 2 * 16 * 4
    for batch in report.batches:
        assert batch.kv_bytes == batch.batch * 17 * row
        assert batch.kv_capacity_bytes == batch.batch * (256 + 256) * row


def test_json_has_what_readers_rely_on(report: BenchReport) -> None:
    told = json.loads(json.dumps(report.to_json()))
    for name in (
        *("schema", "conditions", "plain_tok_per_s", "dmtd_tok_per_s", "ratio", "bound", "outside_share"),
        *("weight_bytes", "private_bytes", "plain_tok_per_s_repeats", "dmtd_tok_per_s_repeats", "batches"),
    ):
        assert name in told
    assert told["batch"] == 1
    assert told["context"] == 7 + 11 / 2
    assert told["plain_tok_per_s"] == report.batches[0].plain_tok_per_s
    assert len(told["plain_tok_per_s_repeats"]) == 3
    conditions = told["conditions"]
    assert conditions["split"] == [0, 3, 2]
    assert (conditions["threads"], conditions["dialect"], conditions["full_pass"]) == (1, "onnxruntime", None)
    assert conditions["cpu"]


@pytest.mark.parametrize("full_pass", ["staged", "fused"])
@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
def test_other_ways_to_run(full_pass: str, dialect: str, bundle: Path, manifest: Manifest) -> None:
    options = BenchOptions(prompt_len=4, max_tokens=6, repeats=1, warmup=0)
    backend = BackendOptions(threads=1, full_pass=full_pass, dialect=dialect, max_model_len=32)  # type: ignore[arg-type]
    report = run_bench(bundle, manifest, options, backend)
    assert report.batches[0].runs["dmtd"][0].full_passes == 2
    assert report.conditions["max_model_len"] == 32
    assert report.conditions["full_pass"] == full_pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (BenchOptions(prompt_len=200, max_tokens=57), "prompt_len: got 200, and 57 new tokens, expected at most 256"),
        (BenchOptions(prompt_len=4, max_tokens=4), "max_tokens: got 4, expected at least 5"),
        (BenchOptions(batches=()), "batches: got none, expected sizes of at least 1"),
        (BenchOptions(batches=(2, 0)), "batches: got 0, expected sizes of at least 1"),
        (BenchOptions(repeats=0, max_tokens=20), "repeats: got 0"),
        (BenchOptions(batches=(3,), prompt_len=4, max_tokens=8), "max_num_seqs: got 3"),
    ],
)
def test_what_cannot_be_run_is_refused(options: BenchOptions, words: str, bundle: Path, manifest: Manifest) -> None:
    with pytest.raises(RequestError, match=words):
        run_bench(bundle, manifest, options, BackendOptions(threads=1))
