"""The ONNX Runtime backend by itself: neighbours change no bit, padding is never seen, NaN stays where it arose."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from runtime_support import (
    CONVENTIONS,
    MARGIN,
    MAX_BATCH,
    Ran,
    TinyBundles,
    make_bundle,
    poisoned_bundle,
    random_prompt,
    run_prompts,
    without_cycle,
)

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference import oracle
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.backends.base import BackendOptions, FullPass, SlotStep
from dmtd_runtime.backends.layouts.packed import PackedLayout
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.backends.onnxruntime.trial import trial_step
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.cycle import CyclePlan, Position
from dmtd_runtime.errors import BackendError, BundleError, RequestError
from dmtd_runtime.sampling.params import SamplingParams

TOKENS = 14
LONG = SamplingParams(temperature=0, max_tokens=TOKENS)
# Every convention, pass and kind of split, not all with all.
USUAL = [*zip((0, 2, 0), CONVENTIONS, ("staged", "fused", "fused"), strict=True)]
both_passes = pytest.mark.parametrize(
    "full_pass", ["staged", "fused", None]
)  # None: the cycle graph, where there is one
both_dialects = pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])


def plan_of(
    tiny: TinyBundles, tau: int, convention: tuple[str, str], layers: int = 0, *, plain: bool = False
) -> CyclePlan:
    return CyclePlan(cycle=tiny.get("qwen3", layers).cycle(tau, convention), plain=plain)


def assert_same_bits(got: Ran, want: Ran, steps: int) -> None:
    assert got.token_ids == want.token_ids[:steps]
    np.testing.assert_array_equal(got.logits.view(np.uint32), want.logits[:steps].view(np.uint32))


@pytest.mark.parametrize(
    ("layers", "convention", "full_pass"),
    [
        pytest.param(*each, marks=[] if each in USUAL else pytest.mark.slow)
        for each in product((0, 2), CONVENTIONS, ("staged", "fused"))
    ],
)
def test_neighbours_change_no_bit(tiny: TinyBundles, layers: int, convention: tuple[str, str], full_pass: str) -> None:
    """Alone in a graph made for one slot against every place in batches of 2 to 8."""
    rng = np.random.default_rng(5)
    for tau, plain in ((4, False), (3, False), (4, True)):
        plan = plan_of(tiny, tau, convention, layers, plain=plain)
        alone = tiny.backend("qwen3", layers, full_pass=full_pass, slots=1)
        prompts = [random_prompt(i, int(length)) for i, length in enumerate(rng.integers(1, 30, MAX_BATCH))]
        wanted = [run_prompts(alone, plan, [prompt], LONG)[0] for prompt in prompts]
        for batch in range(2, MAX_BATCH + 1):
            order = rng.permutation(MAX_BATCH)[:batch]
            backend = tiny.backend("qwen3", layers, full_pass=full_pass, slots=MAX_BATCH)
            got = run_prompts(backend, plan, [prompts[i] for i in order], LONG)
            for index, ran in zip(order, got, strict=True):
                assert_same_bits(ran, wanted[index], TOKENS)


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_neighbours_change_no_bit_at_ordinary_widths(tmp_path: Path, threads: int) -> None:
    """Rows long enough for the kernels to cut them: SmolLM2's widths."""
    source = write_tiny_checkpoint(
        tmp_path / "model",
        layers=3,
        vocab_size=2000,
        hidden_size=576,
        intermediate_size=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
    )
    manifest = export_bundle(
        source, tmp_path / "bundle", ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=4))
    )
    plan = CyclePlan(cycle=manifest.cycle)
    prompts = [random_prompt(i, 1 + 7 * i) for i in range(MAX_BATCH)]
    backends = [
        OnnxRuntimeBackend(tmp_path / "bundle", manifest, BackendOptions(max_num_seqs=slots, threads=threads))
        for slots in (1, MAX_BATCH)
    ]
    wanted = [run_prompts(backends[0], plan, [prompt], LONG)[0] for prompt in prompts]
    for batch in (2, 3, 5, 8):
        for ran, want in zip(run_prompts(backends[1], plan, prompts[:batch], LONG), wanted, strict=False):
            assert_same_bits(ran, want, TOKENS)
    for backend in backends:
        backend.close()


@both_passes
def test_neighbours_that_end_change_no_bit(tiny: TinyBundles, full_pass: str) -> None:
    """Sequences end one by one, so slots are freed and others move into them in mid-cycle."""
    rng = np.random.default_rng(6)
    for convention in CONVENTIONS:
        plan = plan_of(tiny, 4, convention)
        prompts = [random_prompt(50 + i, int(length)) for i, length in enumerate(rng.integers(1, 30, MAX_BATCH))]
        alone = tiny.backend(full_pass=full_pass, slots=1)
        wanted = [run_prompts(alone, plan, [prompt], LONG)[0] for prompt in prompts]
        for _ in range(4):
            lengths = [int(n) for n in rng.permutation(np.r_[1:7, TOKENS, TOKENS])]
            backend = tiny.backend(full_pass=full_pass, slots=MAX_BATCH)
            params = [replace(LONG, max_tokens=n) for n in lengths]
            for ran, want, steps in zip(run_prompts(backend, plan, prompts, params), wanted, lengths, strict=True):
                assert_same_bits(ran, want, steps)


def test_a_used_backend_gives_the_same_bits_as_a_fresh_one(tiny: TinyBundles) -> None:
    """What earlier sequences left in the caches is never seen."""
    bundle = tiny.get()
    plan = plan_of(tiny, 4, ("prompt", "thinking"))
    options = BackendOptions(max_num_seqs=4, threads=1)
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, options)
    prompts = [random_prompt(i, 5 + i) for i in range(4)]
    first = run_prompts(backend, plan, prompts, LONG)
    run_prompts(backend, plan, [random_prompt(90 + i, 100) for i in range(4)], LONG)
    for ran, want in zip(run_prompts(backend, plan, prompts, LONG), first, strict=True):
        assert_same_bits(ran, want, TOKENS)
    backend.close()


@both_dialects
@both_passes
def test_chunks_and_full_pass_modes_stay_within_the_margin(tiny: TinyBundles, dialect: str, full_pass: str) -> None:
    plan = plan_of(tiny, 4, ("absolute", "cyclical"))
    bundle = tiny.get()
    prompt = random_prompt(3, 90)
    want = oracle.greedy(bundle.reference(4, ("absolute", "cyclical")), prompt, TOKENS)
    logits = want.logits.numpy()
    for max_rows in (1, 5, 16, 33, 89, 90, 256):
        backend = tiny.backend(dialect=dialect, full_pass=full_pass, slots=4, max_rows=max_rows)
        for ran in run_prompts(backend, plan, [prompt, random_prompt(4, 7), prompt], LONG)[::2]:
            assert tuple(ran.token_ids) == want.token_ids
            assert np.abs(ran.logits - logits).max() <= MARGIN * np.abs(logits).max()


@pytest.mark.parametrize(("encoding_layers", "expected"), [(0, "staged"), (2, "fused")])
def test_encoding_layers_are_read_once_a_step_by_default(
    tiny: TinyBundles, encoding_layers: int, expected: str
) -> None:
    bundle = tiny.get("qwen3", encoding_layers)
    older = without_cycle(bundle.manifest)
    for asked in (None, "staged", "fused"):
        options = BackendOptions(full_pass=asked, threads=1)  # type: ignore[arg-type]
        for manifest, usual in ((older, expected), (bundle.manifest, None)):
            backend = OnnxRuntimeBackend(bundle.directory, manifest, options)
            assert backend.full_pass == (asked or usual)
            backend.close()


@both_dialects
@both_passes
def test_rubbish_in_unused_rows_is_never_seen(tiny: TinyBundles, dialect: str, full_pass: str) -> None:
    """Rows above the committed length may hold anything finite."""
    bundle = tiny.get("qwen3", 1)
    plan = plan_of(tiny, 3, ("prompt", "sum"), 1)
    options = BackendOptions(dialect=dialect, full_pass=full_pass, max_num_seqs=3, threads=1)
    prompts = [random_prompt(20 + i, n) for i, n in enumerate((1, 9, 4))]
    clean = run_prompts(tiny.backend("qwen3", 1, dialect=dialect, full_pass=full_pass, slots=3), plan, prompts, LONG)
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, options)
    for layer in range(bundle.manifest.model.num_layers):
        for kind in ("key", "value"):
            backend._caches.buffer(layer, kind)[:] = 50.0
    for ran, want in zip(run_prompts(backend, plan, prompts, LONG), clean, strict=True):
        assert_same_bits(ran, want, TOKENS)
    backend.close()


@pytest.mark.parametrize("slots", [1, MAX_BATCH])
@both_dialects
@both_passes
def test_the_whole_model_length_can_be_used(tmp_path: Path, dialect: str, full_pass: str, slots: int) -> None:
    """Up to the last position, where padded rows come closest to the end of the buffers."""
    bundle = make_bundle(tmp_path, max_positions=40)
    convention = ("prompt", "thinking")
    options = BackendOptions(dialect=dialect, full_pass=full_pass, max_num_seqs=slots, threads=1)
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, options)
    assert backend.max_model_len == 40
    plan = CyclePlan(cycle=bundle.cycle(4, convention))
    prompts = [random_prompt(1, 39), random_prompt(2, 20), random_prompt(3, 33)][:slots]
    params = [SamplingParams(temperature=0, max_tokens=40 - len(prompt)) for prompt in prompts]
    for prompt, ran in zip(prompts, run_prompts(backend, plan, prompts, params), strict=True):
        want = oracle.greedy(bundle.reference(4, convention), prompt, 40 - len(prompt))
        assert tuple(ran.token_ids) == want.token_ids
    backend.close()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    return poisoned_bundle(tmp_path_factory.mktemp("poisoned"))


@both_dialects
@both_passes
def test_nan_fails_its_own_sequence_and_leaves_nothing_behind(
    poisoned: tuple[Path, Manifest], dialect: str, full_pass: str
) -> None:
    directory, manifest = poisoned
    options = BackendOptions(dialect=dialect, full_pass=full_pass, max_num_seqs=4, threads=1)
    plan = CyclePlan(cycle=manifest.cycle)
    # Token 255 is never chosen, so only the prompts that hold it are ill.
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={255: -100})
    healthy = [random_prompt(i, 6 + i, 255) for i in range(4)]
    ill = [1, 2, 255, 3, 4]
    backend = OnnxRuntimeBackend(directory, manifest, options)
    want = run_prompts(backend, plan, healthy, params)
    for mix in ([ill, healthy[1], ill, healthy[3]], [ill] * 4, [healthy[0], ill, ill, ill]):
        for prompt, ran in zip(mix, run_prompts(backend, plan, mix, params), strict=True):
            if prompt is ill:
                assert isinstance(ran.error, BackendError)
                assert ran.token_ids == []
            else:
                assert_same_bits(ran, want[healthy.index(prompt)], 9)
        for layer in range(manifest.model.num_layers):
            for kind in ("key", "value"):
                assert np.isfinite(backend._caches.buffer(layer, kind)).all(), f"NaN stays in layer {layer}"
        for ran, before in zip(run_prompts(backend, plan, healthy, params), want, strict=True):
            assert_same_bits(ran, before, 9)
    backend.close()


def test_stats_count_passes_and_refilled_rows(tiny: TinyBundles) -> None:
    bundle = tiny.get()
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, BackendOptions(threads=1))
    plan = plan_of(tiny, 4, ("prompt", "thinking"))
    run_prompts(backend, plan, [random_prompt(0, 6)], SamplingParams(temperature=0, max_tokens=10))
    # Fed: the prompt, then 9 tokens at 6 .. 14: heads at 6, 10, 14, of which the last two refill 3 rows each.
    stats = backend.stats
    assert (stats.full_passes, stats.late_steps, stats.refill_rows) == (1 + 3, 6, 6)
    assert stats.session_seconds > 0
    backend.close()


def test_bindings_are_made_once(tiny: TinyBundles) -> None:
    """Decoding needs three bindings a full cycle (thinking, late rows of it, late steps share one): no more with time."""
    bundle = tiny.get()
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, BackendOptions(threads=1))
    plan = plan_of(tiny, 4, ("prompt", "thinking"))
    run_prompts(backend, plan, [random_prompt(0, 6)], SamplingParams(temperature=0, max_tokens=10))
    after_short = set(backend._runs._bindings)
    run_prompts(backend, plan, [random_prompt(1, 11)], SamplingParams(temperature=0, max_tokens=100))
    assert set(backend._runs._bindings) == after_short
    backend.close()


@both_dialects
def test_prompts_of_all_lengths_need_few_buffers(tiny: TinyBundles, dialect: str) -> None:
    """A process that serves for long sees every length: shapes, and with them memory, must stay few."""
    bundle = tiny.get()
    options = BackendOptions(dialect=dialect, max_num_seqs=2, threads=1)
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, options)
    plan = plan_of(tiny, 4, ("prompt", "thinking"))
    for length in range(1, 120):
        run_prompts(backend, plan, [[1] * length, [2] * 3], SamplingParams(temperature=0, max_tokens=6))
    assert len(backend._outputs) <= 20
    assert len(backend._runs._bindings) <= 40
    backend.close()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_num_seqs": 9}, RequestError, "got 9, expected 1 to 8"),
        ({"max_num_seqs": 0}, RequestError, "got 0, expected"),
        ({"max_num_seqs": 0, "dialect": "standard"}, RequestError, "got 0, expected"),
        ({"max_num_seqs": -1, "dialect": "standard"}, RequestError, "got -1, expected"),
        ({"max_model_len": 257}, RequestError, "got 257, expected 1 to 256"),
        ({"max_model_len": 0}, RequestError, "got 0, expected 1 to 256"),
        ({"threads": 0}, RequestError, "threads: got 0, expected"),
        ({"threads": -2}, RequestError, "threads: got -2, expected"),
        ({"threads": 99999}, RequestError, "threads: got 99999, expected at most"),
        ({"device": "cuda"}, BackendError, "has no CUDAExecutionProvider"),
    ],
)
def test_options_out_of_range(
    tiny: TinyBundles, options: dict[str, object], error: type[Exception], words: str
) -> None:
    bundle = tiny.get()
    with pytest.raises(error, match=words) as caught:
        OnnxRuntimeBackend(bundle.directory, bundle.manifest, BackendOptions(**options))
    assert "\n" not in str(caught.value)


def test_a_dialect_that_the_bundle_lacks(tiny: TinyBundles) -> None:
    bundle = tiny.get()
    graphs = tuple(graph for graph in bundle.manifest.graphs if graph.dialect == "onnxruntime")
    manifest = replace(bundle.manifest, graphs=graphs)
    with pytest.raises(BundleError, match="export it with --target tensorrt"):
        OnnxRuntimeBackend(bundle.directory, manifest, BackendOptions(dialect="standard"))


def test_a_graph_that_is_none(tiny: TinyBundles, tmp_path: Path) -> None:
    ways: tuple[tuple[FullPass | None, str], ...] = ((None, "cycle.ort.onnx"), ("staged", "thinking.ort.onnx"))
    for full_pass, file in ways:
        (tmp_path / file).write_bytes(b"not a graph")
        with pytest.raises(BundleError, match=rf"cannot load .*{file}.*export the bundle again") as caught:
            OnnxRuntimeBackend(tmp_path, tiny.get().manifest, BackendOptions(full_pass=full_pass))
        assert "\n" not in str(caught.value)


def test_a_bfloat16_bundle_is_refused_on_the_cpu(tiny: TinyBundles) -> None:
    bundle = tiny.get()
    manifest = replace(bundle.manifest, model=replace(bundle.manifest.model, dtype="bfloat16"))
    with pytest.raises(BackendError, match="cannot run on the CPU; export it with --dtype float32"):
        OnnxRuntimeBackend(bundle.directory, manifest, BackendOptions())


def test_a_failing_session_becomes_a_backend_error(tiny: TinyBundles, capfd: pytest.CaptureFixture[str]) -> None:
    """A token id that the embedding does not have: ONNX Runtime's own error, in one line."""
    bundle = tiny.get()
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, BackendOptions(threads=1))
    step = plan_of(tiny, 4, ("prompt", "thinking")).next_step(Position(prompt_len=2), 256)
    with pytest.raises(BackendError, match="ONNX Runtime failed") as caught:
        backend.run([SlotStep(slot=0, step=step, ids=[1, 10_000])], [0])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    backend.close()


@pytest.mark.parametrize(("few_shapes", "padded"), [(False, 48), (True, 64)])
def test_a_chunk_of_a_prompt_is_padded_by_less_than_sixteen_rows_where_shapes_are_cheap(
    few_shapes: bool, padded: int
) -> None:
    layout = PackedLayout(3, few_shapes=few_shapes)
    steps = [trial_step(4, 9, 0), trial_step(1, 7, 1), trial_step(35, 34, 2, prefill=True)]
    assert layout.sizes(contract.THINKING, steps)["window_len"] == 4 + 1 + padded
    assert layout.sizes(contract.LATE_DECODE, steps[2:])["late_len"] == padded
