"""Warming up: what generation meets later has run before. The simulator counts a fake second for each first run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle
from device_support import Engines, engine_backend, run_sequences, simulator_engines, tokens_of
from runtime_support import CONVENTIONS, TinyBundles, random_prompt

from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines
from dmtd_runtime import LLM, RequestError, SamplingParams
from dmtd_runtime.backends import opening
from dmtd_runtime.backends.base import BackendOptions, RunStats
from dmtd_runtime.backends.engines.backend import TensorRtBackend
from dmtd_runtime.backends.engines.warm_up import Reach
from dmtd_runtime.backends.onnxruntime.trial import trial_step
from dmtd_runtime.bench import measure as bench
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.device.simulator import device as host
from dmtd_runtime.device.simulator.device import SimulatedDevice

BUCKETS = (16, 48)


@pytest.fixture(scope="module")
def engines(tiny: TinyBundles) -> Callable[..., Engines]:
    made: dict[tuple[int, bool], Engines] = {}

    def make(encoding_layers: int = 0, fused: bool = False) -> Engines:
        key = (encoding_layers, fused)
        if key not in made:
            directory = tiny.get("qwen3", encoding_layers).directory
            made[key] = simulator_engines(directory, fused=fused, max_num_seqs=3, buckets=BUCKETS)
        return made[key]

    return make


def everything(backend: TensorRtBackend, plan: CyclePlan, vocab: int) -> list[list[int]]:
    """Prompts of every length, single steps, cycles by arg-max and sampled, in every bucket; batches that shrink."""
    greedy = SamplingParams(temperature=0.0, max_tokens=60)
    sampled = SamplingParams(temperature=0.9, top_k=20, max_tokens=17)
    watched = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2)
    ran = []
    for params in ([greedy], [sampled], [watched], [greedy, sampled, watched], [sampled] * backend.slots):
        prompts = [random_prompt(i, 1 + 7 * i) for i in range(len(params))]
        ran += run_sequences(backend, plan, vocab, prompts, params)
    ran += run_sequences(backend, plan, vocab, [random_prompt(9, 180), random_prompt(8, 30)], [watched, greedy])
    return [tokens_of(events) for events in ran]


@pytest.mark.parametrize(
    ("graphs", "fused", "tau", "convention"),
    [
        pytest.param(True, False, 4, CONVENTIONS[0], marks=pytest.mark.slow),
        (True, True, 3, CONVENTIONS[1]),
        (False, False, 1, CONVENTIONS[2]),
    ],
)
def test_nothing_stalls_and_nothing_is_captured_after_warming_up(
    tiny: TinyBundles, engines: Callable[..., Engines], graphs: bool, fused: bool, tau: int, convention: Any
) -> None:
    bundle, device = tiny.get("qwen3", 2), SimulatedDevice()
    cycle, vocab = bundle.cycle(tau, convention), bundle.manifest.model.vocab_size
    words = {"cycle": cycle, "slots": 3, "graphs": graphs, "fused": fused}
    backend = engine_backend(bundle.directory, bundle.manifest, engines(2, fused), device=device, **words)
    backend.warm_up()
    stalled, captures, contexts = device.stalled_s, device.captures, len(backend._engines._contexts)
    assert stalled == contexts > 100
    cold = SimulatedDevice()
    fresh = engine_backend(bundle.directory, bundle.manifest, engines(2, fused), device=cold, **words)
    for plain in (False, True):
        plan = CyclePlan(cycle=cycle, plain=plain)
        assert everything(backend, plan, vocab) == everything(fresh, plan, vocab)
    assert (device.stalled_s, device.captures) == (stalled, captures)
    assert len(backend._engines._contexts) == contexts
    assert cold.stalled_s > 20  # without it every one of them falls into generation
    assert bool(captures) == graphs


def test_slots_caches_and_counts_are_as_if_nothing_had_run(tiny: TinyBundles, engines: Callable[..., Engines]) -> None:
    bundle, device = tiny.get(), SimulatedDevice()
    backend = engine_backend(bundle.directory, bundle.manifest, engines(), slots=3, device=device)
    kept = {block.what: block.data.copy() for block in device._blocks.values()}
    backend.warm_up()
    assert backend.stats == RunStats()
    for block in device._blocks.values():
        if block.what not in ("activations", "inputs", "results"):
            np.testing.assert_array_equal(block.data, kept[block.what], block.what)
        if "past_key_values" in block.what:
            assert block.fresh and not block.rows and not block.data.any()
    backend.warm_up()  # again does no harm


def test_warming_up_comes_before_the_first_sequence(tiny: TinyBundles, engines: Callable[..., Engines]) -> None:
    bundle = tiny.get()
    backend = engine_backend(bundle.directory, bundle.manifest, engines())
    backend.run([trial_step(0, 0)], [0])
    with pytest.raises(AssertionError, match="before the first sequence"):
        backend.warm_up()


def test_what_is_reached() -> None:
    reach = Reach(batches=(1, 2), lengths=(16, 64), max_rows=40, cycle_length=3)
    steps = {(s.kind, s.window_len, s.late_len) for s in reach.steps() if (s.batch, s.visible_len) == (2, 64)}
    assert steps == {("prefill", rows, rows) for rows in (16, 32, 40)} | {
        *(("full", rows, 1) for rows in (1, 2, 3)),
        ("late", 0, 1),
    }
    assert max(s.window_len for s in reach.steps() if s.visible_len == 16) == 16  # no more rows than are seen
    cycles = {(s.full, s.window_len, s.sampled) for s in reach.cycles()}
    assert cycles == {
        (full, window, sampled)
        for full, window in (((True, False, False), 3), ((True, True, True), 1))
        for sampled in (False, True)
    }
    assert len(list(reach.cycles())) == 2 * 2 * 4


# From the options.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_bundle(tmp_path_factory.mktemp("warm_up"))
    build_engines(made, BuildOptions(backend="simulator", max_num_seqs=2))
    return made


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimulatedDevice]]:
    """Every simulator that is made."""
    made: list[SimulatedDevice] = []

    class Noted(SimulatedDevice):
        def __init__(self, **words: Any) -> None:
            super().__init__(**words)
            made.append(self)

    monkeypatch.setattr(host, "SimulatedDevice", Noted)
    return made


def test_opening_warms_up_where_it_is_asked_to(bundle: Path, devices: list[SimulatedDevice]) -> None:
    for warm_up in (False, True):
        with LLM(bundle, backend="simulator", max_num_seqs=2, warm_up=warm_up) as llm:
            opened = devices[-1].stalled_s
            llm.generate(["one", "another"], SamplingParams(temperature=0, max_tokens=20))
            assert (devices[-1].stalled_s > opened) == (not warm_up)
            assert (opened > 0) == warm_up
    with LLM(bundle, warm_up=True):  # ONNX Runtime on the CPU has nothing to warm up
        pass
    with pytest.raises(RequestError, match="warm_up: got 1, expected True or False"):
        BackendOptions(warm_up=1)  # type: ignore[arg-type]


def test_a_device_that_fails_while_it_warms_up_is_closed(
    bundle: Path, devices: list[SimulatedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: TensorRtBackend) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorRtBackend, "warm_up", interrupted)
    options = BackendOptions(backend="simulator", warm_up=True)
    with pytest.raises(KeyboardInterrupt):
        opening.open_backend(bundle, open_bundle(bundle), options)
    assert not devices[-1]._blocks


def test_no_first_run_falls_into_what_the_benchmark_times(bundle: Path, devices: list[SimulatedDevice]) -> None:
    """Even where no warm-up was asked for."""
    seen: list[tuple[str, float]] = []

    def on_run(label: str, done: int, total: int) -> None:
        assert (done, total) == (len(seen), 8)
        seen.append((label, sum(device.stalled_s for device in devices)))

    options = bench.BenchOptions(batches=(1, 2), prompt_len=5, max_tokens=20, repeats=1, warmup=0)
    backend = BackendOptions(backend="simulator")
    report = bench.run_bench(bundle, open_bundle(bundle), options, backend, on_run=on_run)
    seen.append(("the end", sum(device.stalled_s for device in devices)))
    spent = {label: later - before for (label, before), (_, later) in itertools.pairwise(seen)}
    assert {label for label, stalled in spent.items() if stalled} == {
        f"batch {batch}, {mode}, warm-up" for batch in (1, 2) for mode in ("plain", "dmtd")
    }
    assert len(spent) == 8
    assert report.conditions["warmup"] == 1
