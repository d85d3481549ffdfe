"""The engine backend on the simulator, equal to the oracle: every bucket, whole cycles, capture and replay."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_support import Engines, engine_backend, run_sequences, simulator_engines, tokens_of
from runtime_support import CONVENTIONS, TinyBundles, poisoned_bundle, random_prompt, tokenizer_of

from dmtd_models.reference import oracle
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.engines.backend import TensorRtBackend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.device.simulator.device import SimulatedDevice
from dmtd_runtime.errors import BackendError, BundleError, RequestError
from dmtd_runtime.sampling.grammar import GrammarCompiler
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.sampling.structured import StructuredOutputs
from dmtd_runtime.serving.loop import run_batch
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

BUCKETS = (16, 32, 48)
PROMPT_LENS = (3, 9, 1)
NEW = (21, 30, 26)

MakeEngines = Callable[..., Engines]


@pytest.fixture(scope="session")
def engines(tiny: TinyBundles) -> MakeEngines:
    made: dict[tuple[Any, ...], Engines] = {}

    def make(encoding_layers: int = 0, *, fused: bool = False, buckets: tuple[int, ...] = BUCKETS) -> Engines:
        key = (encoding_layers, fused, buckets)
        if key not in made:
            made[key] = simulator_engines(tiny.get("qwen3", encoding_layers).directory, fused=fused, buckets=buckets)
        return made[key]

    return make


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, **options)


def vocab_of(tiny: TinyBundles) -> int:
    return tiny.get().manifest.model.vocab_size


def assert_greedy(reference: Any, prompt: list[int], tokens: list[int], count: int, plain: bool) -> None:
    """Each token is the oracle's arg-max over what stands before it: one pass over the finished, causal sequence."""
    assert len(tokens) == count
    logits = oracle.teacher_forced(reference, [*prompt, *tokens[:-1]], len(prompt), plain)
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("tau", [1, 2, 4])
@pytest.mark.parametrize("encoding_layers", [0, 2])
def test_greedy_tokens_are_the_oracles(
    tiny: TinyBundles, engines: MakeEngines, encoding_layers: int, tau: int, convention: Any, plain: bool
) -> None:
    """Three sequences of unlike lengths and ends, over four length buckets, then two: slots move, batches shrink."""
    bundle, device = tiny.get("qwen3", encoding_layers), SimulatedDevice()
    cycle = bundle.cycle(tau, convention)
    backend = engine_backend(
        bundle.directory, bundle.manifest, engines(encoding_layers), cycle=cycle, slots=3, device=device
    )
    plan = CyclePlan(cycle=cycle, plain=plain)
    prompts = [random_prompt(i, length) for i, length in enumerate(PROMPT_LENS)]
    told = run_sequences(backend, plan, vocab_of(tiny), prompts, [greedy(count) for count in NEW])
    reference = bundle.reference(tau, convention)
    for prompt, count, events in zip(prompts, NEW, told, strict=True):
        assert_greedy(reference, prompt, tokens_of(events), count, plain)
    assert device.captures and device.replays >= device.captures
    assert backend.stats.cycles > sum(NEW) // tau // 3
    backend.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_one_graph_for_each_batch_and_length_bucket(tiny: TinyBundles, engines: MakeEngines, graphs: bool) -> None:
    bundle, device = tiny.get(), SimulatedDevice()
    backend = engine_backend(bundle.directory, bundle.manifest, engines(), slots=4, graphs=graphs, device=device)
    plan = CyclePlan(cycle=bundle.manifest.cycle)
    for slots in (1, 2, 3):  # the last one runs in the bucket of 4
        prompts = [random_prompt(i, 5) for i in range(slots)]
        first = run_sequences(backend, plan, vocab_of(tiny), prompts, greedy(70))
        again = run_sequences(backend, plan, vocab_of(tiny), prompts, greedy(70))
        assert [tokens_of(events) for events in first] == [tokens_of(events) for events in again]
    shapes = {(program.shape.batch, program.shape.visible_len) for program in backend._programs.values()}
    capacity = backend.capacity
    assert shapes == {(batch, length) for batch in (1, 2, 4) for length in (*BUCKETS, capacity)}
    assert device.captures == (len(shapes) if graphs else 0)
    cycles_of_70 = 18  # the first token comes from the prompt, 69 more in cycles of 4
    assert device.replays == (2 * 3 * cycles_of_70 - len(shapes) if graphs else 0)
    assert backend.stats.cycles == 2 * 3 * cycles_of_70


def test_the_next_cycle_is_enqueued_before_the_tokens_of_this_one_are_seen(
    tiny: TinyBundles, engines: MakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny.get()
    backend = engine_backend(bundle.directory, bundle.manifest, engines())
    calls: list[str] = []
    start, finish = backend.start_cycle, backend.finish_cycle

    def noted_start(slots: Any, committed: Any, *, follows: bool = False) -> None:
        calls.append("follow" if follows else "start")
        start(slots, committed, follows=follows)

    def noted_finish() -> Any:
        calls.append("finish")
        return finish()

    monkeypatch.setattr(backend, "start_cycle", noted_start)
    monkeypatch.setattr(backend, "finish_cycle", noted_finish)
    run_sequences(backend, CyclePlan(cycle=bundle.manifest.cycle), vocab_of(tiny), [random_prompt(0, 4)], greedy(13))
    assert calls == ["start", "follow", "finish", "follow", "finish", "finish"]  # 1 + 3 * 4 tokens, none to spare


def test_fused_engines_give_the_same_tokens(tiny: TinyBundles, engines: MakeEngines) -> None:
    for encoding_layers in (0, 2):
        bundle = tiny.get("qwen3", encoding_layers)
        plan = CyclePlan(cycle=bundle.manifest.cycle)
        prompts = [random_prompt(i, length) for i, length in enumerate(PROMPT_LENS)]
        ran = []
        for fused in (False, True):
            made = engines(encoding_layers, fused=True)
            backend = engine_backend(bundle.directory, bundle.manifest, made, slots=3, fused=fused)
            ran.append([tokens_of(e) for e in run_sequences(backend, plan, vocab_of(tiny), prompts, greedy(19))])
            backend.close()
        assert ran[0] == ran[1]


@pytest.mark.parametrize(
    ("encoding_layers", "built_fused", "expected"),
    [(0, False, "staged"), (0, True, "staged"), (2, False, "staged"), (2, True, "fused")],
)
def test_full_passes_run_fused_where_layers_and_engines_ask_for_it(
    tiny: TinyBundles, engines: MakeEngines, encoding_layers: int, built_fused: bool, expected: str
) -> None:
    bundle, (directory, record) = tiny.get("qwen3", encoding_layers), engines(encoding_layers, fused=built_fused)
    backend = TensorRtBackend(
        bundle.directory,
        bundle.manifest,
        BackendOptions(threads=1),
        device=SimulatedDevice(),
        directory=directory,
        record=record,
    )
    assert backend.full_pass == expected
    backend.close()


SAMPLED = [
    SamplingParams(temperature=0.9, max_tokens=33),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.8, min_p=0.05, max_tokens=40),
    SamplingParams(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, max_tokens=37),
    SamplingParams(temperature=0.0, frequency_penalty=1.5, logit_bias={4: 3.0, 200: -5.0}, max_tokens=29),
    SamplingParams(temperature=0.0, max_tokens=25),
    SamplingParams(temperature=1.0, min_tokens=20, stop_token_ids=tuple(range(0, 256, 2)), max_tokens=30),
]


def test_sampled_tokens_are_those_of_the_host(tiny: TinyBundles, engines: MakeEngines) -> None:
    """Six sequences with all options, slots moving as they end, against the numpy sampler over ONNX Runtime's logits."""
    bundle = tiny.get()
    plan = CyclePlan(cycle=bundle.manifest.cycle)
    prompts = [random_prompt(i, 2 + i) for i in range(len(SAMPLED))]
    backend = engine_backend(bundle.directory, bundle.manifest, engines(), slots=6)
    on_host = tiny.backend(slots=6)
    told = run_sequences(backend, plan, vocab_of(tiny), prompts, SAMPLED)
    wanted = run_sequences(on_host, plan, vocab_of(tiny), prompts, SAMPLED)  # type: ignore[arg-type]
    assert [tokens_of(events) for events in told] == [tokens_of(events) for events in wanted]
    assert [events[-1].finish_reason for events in told] == [events[-1].finish_reason for events in wanted]
    assert backend.stats.cycles > 5


def test_log_probabilities_go_step_by_step_and_cycles_take_over_again(tiny: TinyBundles, engines: MakeEngines) -> None:
    """While one sequence wants logits nobody runs in cycles; counts of the penalties are then what the host counted."""
    bundle = tiny.get()
    plan = CyclePlan(cycle=bundle.manifest.cycle)
    params = [
        SamplingParams(temperature=0.0, logprobs=2, max_tokens=9),
        SamplingParams(temperature=0.0, frequency_penalty=1.0, repetition_penalty=1.2, max_tokens=40),
    ]
    prompts = [random_prompt(i, 4) for i in range(2)]
    backend = engine_backend(bundle.directory, bundle.manifest, engines(), slots=2)
    told = run_sequences(backend, plan, vocab_of(tiny), prompts, params)
    wanted = run_sequences(tiny.backend(slots=2), plan, vocab_of(tiny), prompts, params)  # type: ignore[arg-type]
    assert [tokens_of(events) for events in told] == [tokens_of(events) for events in wanted]
    got, expected = ([e.choice.logprob for e in events[0] if e.choice] for events in (told, wanted))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert backend.stats.cycles == -(-39 // 4), "every token of the other behind its prompt's is of a whole cycle"


def test_a_form_goes_step_by_step_beside_free_sequences(tiny: TinyBundles, engines: MakeEngines) -> None:
    """As log probabilities do: its tokens are allowed ones, its neighbour's are its own, and cycles take over again."""
    bundle = tiny.get()
    tokenizer, vocab = tokenizer_of(bundle.directory), vocab_of(tiny)
    grammar = GrammarCompiler(tokenizer, vocab_size=vocab).compile(StructuredOutputs(regex="[a-f]{9}"))
    params = [SamplingParams(temperature=1.5, max_tokens=30), greedy(40)]
    prompts = [random_prompt(i, 4) for i in range(2)]
    backend = engine_backend(bundle.directory, bundle.manifest, engines(), slots=2)
    plan = CyclePlan(cycle=bundle.manifest.cycle)
    formed, free = (tokens_of(e) for e in run_sequences(backend, plan, vocab, prompts, params, {0: grammar}))
    assert re.fullmatch("[a-f]{9}", tokenizer.decode(formed))
    assert free == bundle.greedy_tokens(prompts[1], 40)
    assert backend.stats.cycles == -(-39 // 4), "every token of the other behind its prompt's is of a whole cycle"


def test_no_token_behind_the_end_is_told(tiny: TinyBundles, engines: MakeEngines) -> None:
    """An end inside a cycle, at every phase: by a stop id, while another sequence goes on."""
    bundle = tiny.get()
    plan = CyclePlan(cycle=bundle.manifest.cycle)
    prompts = [random_prompt(7, 6), random_prompt(8, 3)]
    backend = engine_backend(bundle.directory, bundle.manifest, engines(), slots=2)
    whole, other = (tokens_of(e) for e in run_sequences(backend, plan, vocab_of(tiny), prompts, greedy(24)))
    for end in range(2, 14):
        first = whole.index(whole[end])
        params = [greedy(24, stop_token_ids=[whole[end]]), greedy(24)]
        told = run_sequences(backend, plan, vocab_of(tiny), prompts, params)
        assert tokens_of(told[0]) == whole[: first + 1]
        assert (told[0][-1].finish_reason, told[0][-1].stop_reason) == ("stop", whole[end])
        assert tokens_of(told[1]) == other


def test_cancelling_acts_at_the_end_of_a_cycle(tiny: TinyBundles, engines: MakeEngines) -> None:
    bundle = tiny.get()
    backend = engine_backend(bundle.directory, bundle.manifest, engines(), slots=2)
    events: list[TokenEvent] = []
    other: list[TokenEvent] = []
    prompts = [random_prompt(1, 4), random_prompt(2, 4)]

    def sequence(index: int, told: list[TokenEvent], cancelled: Any) -> SequenceRun:
        sampler = Sampler(greedy(40), vocab_size=vocab_of(tiny), prompt_ids=prompts[index], seed=0)
        return SequenceRun(
            ids=list(prompts[index]),
            sampler=sampler,
            stops=StopRules(greedy(40)),
            on_event=told.append,
            cancelled=cancelled,
        )

    run_batch(
        backend,
        CyclePlan(cycle=bundle.manifest.cycle),
        [
            sequence(0, events, lambda: "abort" if len(events) >= 6 else None),
            sequence(1, other, lambda: None),
        ],
    )
    assert events[-1].finish_reason == "abort"
    assert len(tokens_of(events)) == 9  # the prompt's token and two cycles: the second was under way
    [alone] = run_sequences(backend, CyclePlan(cycle=bundle.manifest.cycle), vocab_of(tiny), [prompts[1]], greedy(40))
    assert tokens_of(other) == tokens_of(alone)


def test_nan_ends_its_own_sequence_and_leaves_no_trace(tmp_path: Path) -> None:
    directory, manifest = poisoned_bundle(tmp_path)
    made = simulator_engines(directory, max_num_seqs=2)
    backend = engine_backend(directory, manifest, made, slots=2)
    plan, vocab = CyclePlan(cycle=manifest.cycle), manifest.model.vocab_size
    good, bad = random_prompt(3, 5, 200), [1, 255, 2]
    [alone] = run_sequences(backend, plan, vocab, [good], greedy(20, logit_bias={255: -100.0}))
    # Sampling masks the poisoned token for the good sequence alone.
    told = run_sequences(backend, plan, vocab, [bad, good], [greedy(20), greedy(20, logit_bias={255: -100.0})])
    assert isinstance(told[0][-1].error, BackendError)
    assert "NaN or infinity" in str(told[0][-1].error)
    assert tokens_of(told[1]) == tokens_of(alone)
    [later] = run_sequences(backend, plan, vocab, [good], greedy(20, logit_bias={255: -100.0}))
    assert tokens_of(later) == tokens_of(alone)


def test_limits_of_the_engines_are_told(tiny: TinyBundles, engines: MakeEngines) -> None:
    bundle, (directory, record) = tiny.get(), engines()
    for options, message in (
        (BackendOptions(max_num_seqs=9), r"max_num_seqs: got 9, expected 1 to 8, .*--max-num-seqs 9"),
        (BackendOptions(max_model_len=257), r"max_model_len: got 257, expected 1 to 256, .*--max-model-len 257"),
    ):
        with pytest.raises(RequestError, match=message):
            TensorRtBackend(
                bundle.directory, bundle.manifest, options, device=SimulatedDevice(), directory=directory, record=record
            )


def test_engines_of_an_older_bundle_are_refused(tiny: TinyBundles, engines: MakeEngines) -> None:
    bundle, (directory, record) = tiny.get(), engines()
    older = replace(record, engines=tuple(e for e in record.engines if e.graph != "sample_token"))
    with pytest.raises(BundleError, match=r"holds no sample_token engine, .*; export the bundle again, then build"):
        engine_backend(bundle.directory, bundle.manifest, (directory, older))


@pytest.mark.parametrize(
    ("name", "dims", "fits"),
    [
        ("position_ids", (-1, 1), False),  # prompts have more rows
        ("visible_rows", (512,), False),  # shorter buckets too
        ("logit_rows", (-1, 1), True),  # one row a sequence in every profile
        ("logit_rows", (-1, 2), False),
        ("logits", (-1, 1, 259), True),
        ("logits", (-1, -1, -1), True),  # an output may be told as open
        ("logits", (-1, -1, 258), False),
        ("past_key_values.3.key", (-1, 2, -1, 16), False),  # an input of fixed capacity may not
        ("past_key_values.3.key", (-1, 2, 512), False),
    ],
)
def test_an_engines_own_dimensions_must_take_the_profiles_ranges(
    tiny: TinyBundles,
    engines: MakeEngines,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dims: tuple[int, ...],
    fits: bool,
) -> None:
    bundle = tiny.get()
    load = SimulatedDevice.load_engine

    def told_otherwise(self: SimulatedDevice, path: Path) -> Any:
        engine: Any = load(self, path)
        if path.stem == "late_decode":
            engine.tensors[name] = replace(engine.tensors[name], dims=dims)
        return engine

    monkeypatch.setattr(SimulatedDevice, "load_engine", told_otherwise)
    if not fits:
        with pytest.raises(BackendError, match=rf"late_decode.onnx, {name}: the engine has .*, its record says"):
            engine_backend(bundle.directory, bundle.manifest, engines())
    else:
        engine_backend(bundle.directory, bundle.manifest, engines()).close()


def test_too_little_memory_is_said_with_numbers_before_anything_is_allocated(
    tiny: TinyBundles, engines: MakeEngines
) -> None:
    bundle, device = tiny.get(), SimulatedDevice(memory_bytes=100_000)
    with pytest.raises(BackendError, match=r"0\.00 of 0\.00 GB free; lower --max-num-seqs") as refused:
        engine_backend(bundle.directory, bundle.manifest, engines(), slots=8, device=device)
    assert "caches of 8 x 512 rows" in str(refused.value)
    assert device.memory() == (100_000, 100_000)


def test_a_prompt_longer_than_a_chunk(tiny: TinyBundles) -> None:
    bundle = tiny.get()
    made = simulator_engines(bundle.directory, max_model_len=128)
    backend = engine_backend(bundle.directory, bundle.manifest, made, slots=2)
    backend.max_rows = 16
    prompts = [random_prompt(5, 60), random_prompt(6, 3)]
    plan = CyclePlan(cycle=bundle.manifest.cycle)
    told = run_sequences(backend, plan, vocab_of(tiny), prompts, greedy(12))
    reference = bundle.reference(4, CONVENTIONS[1])
    for prompt, events in zip(prompts, told, strict=True):
        assert_greedy(reference, prompt, tokens_of(events), 12, False)
