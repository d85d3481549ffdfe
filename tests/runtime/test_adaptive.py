"""Sequences that leave their cycles where they are unsure, against the oracle: the logits, the heads, the doubts.

The oracle runs once over each finished sequence under the heads that it had, and once more at every head that came early for
no unsure step before it, as the late step that it would have been: what was kept must have been sure enough to be kept, what
ended its cycle must not have been sure enough to stay, and what was dropped must have been 0.4 less sure than was wanted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from device_support import engine_backend, run_sequences, simulator_engines, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_support import CONVENTIONS, MARGIN, MAX_BATCH, Ran, Reference, TinyBundles, random_prompt, run_prompts

from dmtd_models.reference import oracle
from dmtd_runtime import LLM, RequestError, SamplingParams
from dmtd_runtime.backends.base import SlotCycle
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.sampling.confidence import confidence

DEFAULT_CASES, SLOW_CASES = 25, 3_000
CONFIDENCES = (0.0, 0.1, 0.15, 0.25, 0.5, 0.6, 1.0)
NEAR = 1e-4  # of a probability


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    family: str
    encoding_layers: int
    tau: int
    convention: tuple[str, str]
    dialect: str
    full_pass: str
    slots: int
    prompts: tuple[tuple[int, int], ...]  # seed, length
    confidences: tuple[float, ...]
    tokens: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(1, 6))
    prompt = st.tuples(st.integers(0, 1 << 20), st.integers(1, 30))
    return Case(
        family=draw(st.sampled_from(("qwen3", "llama", "qwen2"))),
        encoding_layers=draw(st.sampled_from((0, 2))),
        tau=draw(st.integers(1, 6)),
        convention=draw(st.sampled_from([each for each in CONVENTIONS if each[0] == "prompt"])),
        dialect=draw(st.sampled_from(("onnxruntime", "standard"))),
        full_pass=draw(st.sampled_from(("staged", "fused"))),
        slots=draw(st.sampled_from([slots for slots in (1, 3, 6, MAX_BATCH) if slots >= batch])),
        prompts=tuple(draw(st.lists(prompt, min_size=batch, max_size=batch))),
        confidences=tuple(draw(st.lists(st.sampled_from(CONFIDENCES), min_size=batch, max_size=batch))),
        tokens=draw(st.integers(6, 16)),
    )


def softmax_max(logits: np.ndarray) -> float:
    return float(np.exp(logits - np.logaddexp.reduce(logits.astype(np.float64))).max())


def check_sequence(reference: Reference, prompt: list[int], ran: Ran, wanted: float, seen: Counter[str]) -> None:
    tau, n = reference.spec.cycle_length, len(prompt)
    ids = [*prompt, *ran.token_ids[:-1]]
    expected = oracle.teacher_forced(reference, ids, n, heads=ran.heads)[n - 1 :].numpy()
    scale = np.abs(expected).max()
    assert np.abs(ran.logits - expected).max() <= MARGIN * scale
    for row, token in zip(expected, ran.token_ids, strict=True):
        assert row.max() - row[token] <= 2 * MARGIN * scale
    assert len(ran.heads) + ran.late_steps - ran.dropped == len(ran.token_ids) - 1
    left = dropped = unclear = 0
    sure = {at: softmax_max(expected[at - n + 1]) for at in range(n, len(ids)) if at not in ran.heads}
    for at in range(n, len(ids)):
        before = [head for head in ran.heads if head < at]
        if at in sure:
            assert sure[at] >= wanted - 0.4 - NEAR, "a choice that should have been dropped was kept"
            assert sure.get(at - 1, 1) >= wanted - NEAR, "a cycle went on behind an unsure choice"
            assert at - before[-1] < tau
        elif before and at - before[-1] < tau and wanted < 1:
            near = abs(sure.get(at - 1, 1) - wanted) < NEAR
            unclear += near
            if sure.get(at - 1, 1) < wanted:
                left += 1
                continue
            dropped += 1
            late = oracle.teacher_forced(reference, ids[: at + 1], n, heads=before)[-1].numpy()
            assert near or softmax_max(late) < wanted - 0.4 + NEAR, "a choice that should have been kept was dropped"
    assert abs(ran.dropped - dropped) <= unclear
    assert wanted < 1 or (len(ran.heads) == len(ids) - n and ran.late_steps == ran.dropped == 0)
    assert wanted > 0 or ran.heads == tuple(range(n, len(ids), tau))
    seen.update(dropped=dropped, left=left, kept=len(sure) - left)


def check_case(tiny: TinyBundles, case: Case, seen: Counter[str]) -> None:
    bundle = tiny.get(case.family, case.encoding_layers)
    backend = tiny.backend(
        case.family,
        case.encoding_layers,
        dialect=case.dialect,  # type: ignore[arg-type]
        full_pass=case.full_pass,  # type: ignore[arg-type]
        slots=case.slots,
    )
    prompts = [random_prompt(seed, length) for seed, length in case.prompts]
    params = [SamplingParams(temperature=0, max_tokens=case.tokens, min_confidence=p) for p in case.confidences]
    found = run_prompts(backend, CyclePlan(cycle=bundle.cycle(case.tau, case.convention)), prompts, params)
    for prompt, ran, wanted in zip(prompts, found, case.confidences, strict=True):
        assert (len(ran.token_ids), ran.error) == (case.tokens, None)
        check_sequence(bundle.reference(case.tau, case.convention), prompt, ran, wanted, seen)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [DEFAULT_CASES, pytest.param(SLOW_CASES, marks=pytest.mark.slow)])
def test_every_doubt_is_the_oracles(tiny: TinyBundles, count: int) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def check(case: Case) -> None:
        check_case(tiny, case, seen)

    check()
    assert min(seen["dropped"], seen["left"], seen["kept"]) >= count, seen


def test_a_whole_run_is_the_oracles(tiny: TinyBundles) -> None:
    """Free decoding, of the oracle by full recomputation, where no probability lies near the one that is wanted."""
    bundle = tiny.get("llama", 2)
    reference, backend = bundle.reference(4, ("prompt", "thinking")), tiny.backend("llama", 2)
    plan = CyclePlan(cycle=bundle.cycle(4, ("prompt", "thinking")))
    dropped = 0
    for seed, wanted in itertools.product(range(3), (0.2, 0.55)):
        prompt = random_prompt(seed, 9)
        want = oracle.adaptive(reference, prompt, 16, wanted)
        [ran] = run_prompts(
            backend, plan, [prompt], SamplingParams(temperature=0, max_tokens=16, min_confidence=wanted)
        )
        assert (tuple(ran.token_ids), ran.heads) == (want.token_ids, want.heads)
        assert (ran.late_steps, ran.dropped) == (want.late_steps, want.dropped)
        assert len(want.heads) > 4  # of fixed cycles
        dropped += want.dropped
    assert dropped > 4


def test_confidence_is_softmax_before_any_option() -> None:
    logits = np.array([1.0, 3.0, -2.0, 3.0], np.float32)
    assert confidence(logits) == pytest.approx(np.exp(3) / np.exp([1, 3, -2, 3]).sum())
    assert confidence(np.array([5.0], np.float32)) == 1.0
    assert np.isnan(confidence(np.array([np.nan, 1.0], np.float32)))
    assert confidence(np.array([3e38, -3e38], np.float32)) == 1.0


def test_what_is_drawn_comes_from_the_pass_that_was_kept(tiny: TinyBundles) -> None:
    """Options change the choice, never the doubt: heads of a sampled sequence are told by raw logits alone."""
    bundle = tiny.get()
    reference, backend = bundle.reference(4, ("prompt", "thinking")), tiny.backend(slots=3)
    plan = CyclePlan(cycle=bundle.cycle(4, ("prompt", "thinking")))
    options = ({"temperature": 1.5}, {"logit_bias": {7: 100.0}}, {"temperature": 0.7, "top_k": 3})
    params = [SamplingParams(max_tokens=20, min_confidence=0.6, seed=3, **each) for each in options]  # type: ignore[arg-type]
    prompts, dropped = [random_prompt(seed, 12) for seed in range(3)], 0
    for prompt, ran in zip(prompts, run_prompts(backend, plan, prompts, params), strict=True):
        ids = [*prompt, *ran.token_ids[:-1]]
        expected = oracle.teacher_forced(reference, ids, 12, heads=ran.heads)[11:].numpy()
        assert np.abs(ran.logits - expected).max() <= MARGIN * np.abs(expected).max()
        late = {at: softmax_max(expected[at - 11]) for at in range(12, len(ids)) if at not in ran.heads}
        assert min(late.values(), default=1) >= 0.2 - NEAR
        assert all(at + 1 in {*ran.heads, len(ids)} for at, sure in late.items() if sure < 0.6 - NEAR)
        assert len(ran.heads) > 5  # of fixed cycles
        dropped += ran.dropped
    assert dropped > 0


def test_whole_cycles_of_engines_are_left_too(tiny: TinyBundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device tells how sure it was; what was launched ahead of a doubt is dropped, and the next window is shorter."""
    bundle = tiny.get("llama", 2)
    backend = engine_backend(bundle.directory, bundle.manifest, simulator_engines(bundle.directory), slots=3)
    started: list[tuple[bool, tuple[int, ...]]] = []
    start, plan = backend.start_cycle, CyclePlan(cycle=bundle.manifest.cycle)

    def noted_start(slots: Sequence[SlotCycle], committed: Sequence[int], *, follows: bool = False) -> None:
        started.append((follows, tuple(len(each.steps[0].window) for each in slots)))
        start(slots, committed, follows=follows)

    monkeypatch.setattr(backend, "start_cycle", noted_start)
    wanted, prompts = (0.55, 0.0, 0.16, 0.55), [random_prompt(seed, 9) for seed in range(4)]
    params = [SamplingParams(temperature=0, max_tokens=40, min_confidence=p) for p in wanted]
    told = run_sequences(backend, plan, 259, prompts[:3], params[:3]) + run_sequences(
        backend, plan, 259, prompts[3:], params[3:]
    )
    launched, windows = sum(follows for follows, _ in started), Counter(w for _, lens in started for w in lens)
    for prompt, p, events in zip(prompts, wanted, told, strict=True):
        want = oracle.adaptive(bundle.reference(4, ("prompt", "thinking")), prompt, 40, p)
        assert tuple(tokens_of(events)) == want.token_ids
        assert (p > 0.4) == (want.dropped > 2)
        assert (p > 0) == (len(want.heads) > 10)
    assert launched > 4
    assert min(windows[rows] for rows in (1, 2, 3, 4)) > 0
    backend.close()


def test_the_metrics_of_an_answer(tiny: TinyBundles) -> None:
    bundle = tiny.get("llama", 2)
    prompt = random_prompt(0, 9)
    want = oracle.adaptive(bundle.reference(4, ("prompt", "thinking")), prompt, 16, 0.55)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with LLM(bundle.directory, threads=1) as llm:
        asked = [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, min_confidence=p) for p in (0.55, 1.0)]
        adaptive, every, fixed = llm.generate([prompt] * 3, [*asked, params])
        assert tuple(adaptive.outputs[0].token_ids) == want.token_ids
        told = adaptive.metrics
        assert (told.full_passes, told.late_steps, told.dropped_tokens) == (
            len(want.heads),
            want.late_steps,
            want.dropped,
        )
        assert told.tokens_per_full_pass == pytest.approx(15 / len(want.heads))
        assert (every.metrics.full_passes, every.metrics.late_steps, every.metrics.tokens_per_full_pass) == (15, 0, 1)
        assert (fixed.metrics.full_passes, fixed.metrics.late_steps, fixed.metrics.dropped_tokens) == (4, 11, 0)
        assert llm.snapshot().dropped_tokens == want.dropped
    with LLM(bundle.directory, threads=1, plain=True) as llm:
        plain, same = llm.generate([prompt] * 2, [asked[0], params])
        assert plain.outputs[0].token_ids == same.outputs[0].token_ids


def test_an_absolute_origin_is_refused_by_name(tiny: TinyBundles, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny.get()
    with LLM(bundle.directory, threads=1) as llm:
        absolute = CyclePlan(cycle=bundle.cycle(4, ("absolute", "cyclical")))
        monkeypatch.setattr(llm, "_plan", absolute)
        with pytest.raises(RequestError, match="cycle_origin absolute") as refused:
            llm.generate([[1, 2]], SamplingParams(min_confidence=0.5))
        assert refused.value.param == "min_confidence"
