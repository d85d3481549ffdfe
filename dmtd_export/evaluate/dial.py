"""The dial from quality to speed: what a wanted confidence costs and keeps, between fixed cycles and plain decoding.

Everything starts from the plain base's greedy answers to the everyday prompts. For each confidence:

    those answers, teacher-forced through the runtime's own loop --> perplexity ratio, agreement of kept tokens by phase
    free greedy answers to the same prompts                      --> matched prefix, fluency, tokens a full pass, dropped steps
    one sequence at a time, and a full batch, beside plain decoding of the same prompts --> measured speed

Whether a late step is kept depends on its logits, so a known text has to be fed token by token here, unlike elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmtd_export.evaluate.bundle_scorer import score_logits
from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.fluency import everyday_items, voice_of
from dmtd_export.evaluate.generation import MAX_BATCH, Answer, GenerationRun, write_answers
from dmtd_export.evaluate.scorer import Array, Scorer, ScoreRequest, TokenScores
from dmtd_export.evaluate.statistics import Bootstrap, Estimate
from dmtd_runtime import SamplingParams
from dmtd_runtime.backends.base import Backend, BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bench.conditions import conditions_of, load_average
from dmtd_runtime.bench.run import run_once
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.cycle import CyclePlan, StepKind
from dmtd_runtime.sampling.sampler import Choice, Logits, Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import run_batch
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

SPEED_RUNS, BATCH_RUNS = 4, 2
CONDITIONS = ("cpu", "cores", "threads", "load_average", "device", "dtype", "onnxruntime", "commit")
Range = tuple[float, float, float]
"""Median, least, most."""
MODEL_NLL, BASE_NLL, TOKENS, AGREED = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class DialSetting:
    """One confidence. ``ratio``, agreements and shares are of kept tokens, by phase ("0": heads).

    Steps are those of free answers, late and dropped ones a token. ``speed`` over plain decoding, of one sequence at a time,
    and ``batch_speed`` of as many as the result says.
    """

    min_confidence: float
    ratio: Estimate
    agreement: Estimate
    agreement_by_phase: Mapping[str, float]
    share_by_phase: Mapping[str, float]
    matched: Estimate
    nll: Estimate
    distinct_3grams: float
    tokens_per_full_pass: float
    late_steps: float
    dropped: float
    speed: Range
    batch_speed: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class DialResult:
    """Settings by confidence, and the plain base's own fluency. ``batch``: sequences at a time of a batch.

    ``conditions`` of the measured speed: the machine, and what ran on it.
    """

    settings: tuple[DialSetting, ...]
    base_nll: Estimate
    prompts: int
    batch: int
    conditions: Mapping[str, Any]


def measure_dial(
    model: GenerationRun,
    base: GenerationRun,
    scorer: Scorer,
    confidences: Sequence[float],
    bootstrap: Bootstrap,
    on_done: Callable[[int], None] = lambda count: None,
) -> DialResult:
    """Measure every confidence, and 0, fixed cycles. ``base`` writes plainly, ``scorer`` is the plain base's.

    Raises:
        EvaluateError: cycles of the bundle cannot be left.
    """
    manifest = open_bundle(model.bundle)
    if manifest.cycle.cycle_origin != "prompt":
        raise EvaluateError(
            "got a model of cycle origin absolute, whose heads stand where the count of positions puts them; leave it out",
            param="min_confidence",
        )
    items, wanted, load = everyday_items(), sorted({0.0, *confidences}), load_average()
    plain = write_answers(base, items, on_done)
    read = [_plain_scores(answer, scorer) for answer in plain]
    own = np.array([(-float(scores.target_logprobs.sum()), len(scores.target_logprobs)) for scores in read], np.float64)
    batch = min(_batch_of(manifest), _batch_of(open_bundle(base.bundle)))
    speeds = {size: _speeds(model, base, manifest, plain, size, wanted) for size in {1, batch}}
    settings = []
    for confidence in wanted:
        free = write_answers(replace(model, min_confidence=confidence), items, on_done)
        forced = _forced_sums(model, manifest, plain, confidence, read)
        speed = (speeds[1][confidence], speeds[batch][confidence])
        settings.append(_setting(confidence, free, plain, forced, speed, scorer, bootstrap))
    conditions = conditions_of(model.bundle, manifest, _options(model, batch), load)
    return DialResult(
        settings=tuple(settings),
        base_nll=bootstrap.estimate(own, lambda s: s[..., 0] / s[..., 1]),
        prompts=len(items),
        batch=batch,
        conditions={name: conditions[name] for name in CONDITIONS},
    )


def _setting(
    confidence: float,
    free: Sequence[Answer],
    plain: Sequence[Answer],
    forced: Array,
    speed: tuple[Range, Range],
    scorer: Scorer,
    bootstrap: Bootstrap,
) -> DialSetting:
    sums, phases = forced.sum(-1), forced.sum(0)  # [answers, 4], [4, phases]
    voice = voice_of(free, scorer, bootstrap)
    matched = np.array([[_common(a.token_ids, b.token_ids), 1] for a, b in zip(free, plain, strict=True)], np.float64)
    full, late, dropped = (
        sum(getattr(answer.metrics, name) for answer in free)
        for name in ("full_passes", "late_steps", "dropped_tokens")
    )
    kept = full + late - dropped
    shown = [k for k in range(phases.shape[-1]) if phases[TOKENS, k]]
    return DialSetting(
        min_confidence=confidence,
        ratio=bootstrap.estimate(sums, lambda s: np.exp((s[..., MODEL_NLL] - s[..., BASE_NLL]) / s[..., TOKENS])),
        agreement=bootstrap.estimate(sums, lambda s: s[..., AGREED] / s[..., TOKENS]),
        agreement_by_phase={str(k): float(phases[AGREED, k] / phases[TOKENS, k]) for k in shown},
        share_by_phase={str(k): float(phases[TOKENS, k] / phases[TOKENS].sum()) for k in shown},
        matched=bootstrap.estimate(matched, lambda s: s[..., 0] / s[..., 1]),
        nll=voice.nll,
        distinct_3grams=voice.distinct_3grams,
        tokens_per_full_pass=kept / max(1, full),
        late_steps=late / max(1, kept),
        dropped=dropped / max(1, kept),
        speed=speed[0],
        batch_speed=speed[1],
    )


class _ForcedSampler(Sampler):
    """Gives the next token of a known answer, and notes how likely it was and what was likeliest."""

    def __init__(self, answer: Answer, params: SamplingParams, vocab_size: int) -> None:
        super().__init__(params, vocab_size=vocab_size, prompt_ids=(), seed=0)
        self.logprobs: list[float] = []
        self.top1: list[int] = []
        self._answer = answer

    @property
    def needs_host(self) -> bool:
        return True

    def choose(self, logits: Logits) -> Choice:
        token = self._answer.token_ids[len(self.top1)]
        [logprob], [best] = score_logits(logits[None], [token])
        self.logprobs.append(float(logprob))
        self.top1.append(int(best))
        self.observe(token)
        return Choice(token_id=token)


class _PhasedRun(SequenceRun):
    """Notes the positions that are heads."""

    __slots__ = ("heads",)
    heads: list[int]

    def count(self, kind: StepKind) -> None:
        if kind == "full":
            self.heads.append(len(self.ids) - 1)
        SequenceRun.count(self, kind)


def _forced_sums(
    run: GenerationRun,
    manifest: Manifest,
    answers: Sequence[Answer],
    confidence: float,
    read: Sequence[TokenScores],
) -> Array:
    """Of each answer but its first token, which the prompt gives: sums float64 [answers, 4, phases]. ``read``: by the base."""
    sequences = []
    for answer in answers:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=len(answer.token_ids))
        sequence = _PhasedRun(
            ids=list(answer.prompt_ids),
            sampler=_ForcedSampler(answer, params, manifest.model.vocab_size),
            stops=StopRules(params),
            on_event=_raise,
            min_confidence=confidence,
        )
        sequence.heads = []
        sequences.append(sequence)
    with closing(_open(run, manifest, _batch_of(manifest), answers)) as backend:
        run_batch(backend, CyclePlan(cycle=manifest.cycle), sequences, static=False)
    sums = np.zeros((len(answers), 4, manifest.cycle.cycle_length))
    for found, sequence, answer, plain in zip(sums, sequences, answers, read, strict=True):
        n, sampler = len(answer.prompt_ids), sequence.sampler
        assert isinstance(sampler, _ForcedSampler), "as it was made"
        heads = np.array(sequence.heads, np.int64)
        for k in range(1, len(answer.token_ids)):
            at = n + k - 1  # the row that was fed when the token was chosen
            phase = at - int(heads[heads <= at].max())
            agreed = sampler.top1[k] == int(plain.top1[k])
            found[:, phase] += (-sampler.logprobs[k], -float(plain.target_logprobs[k]), 1, agreed)
    return sums


def _raise(event: TokenEvent) -> None:
    if event.error is not None:
        raise event.error


def _plain_scores(answer: Answer, scorer: Scorer) -> TokenScores:
    n = len(answer.prompt_ids)
    ids = (*answer.prompt_ids, *answer.token_ids)
    [scores] = scorer.score([ScoreRequest(token_ids=ids, prompt_len=n, plain=True, first_row=n - 1)])
    return scores


def _speeds(
    model: GenerationRun,
    base: GenerationRun,
    manifest: Manifest,
    answers: Sequence[Answer],
    batch: int,
    wanted: Sequence[float],
) -> dict[float, Range]:
    """Tokens a second over plain decoding's, ``batch`` sequences at a time, of the prompts with the longest answers.

    Every group of prompts is run by all in turn, each sequence to the same length, whatever it writes.
    """
    longest = [answer for answer in sorted(answers, key=lambda a: -len(a.token_ids)) if len(answer.token_ids) > 1]
    groups = [longest[:batch]] * BATCH_RUNS if batch > 1 else [[answer] for answer in longest[:SPEED_RUNS]]
    rates: dict[float, list[float]] = defaultdict(list)
    base_manifest, vocab_size = open_bundle(base.bundle), manifest.model.vocab_size
    cycles, every = CyclePlan(cycle=manifest.cycle), CyclePlan(cycle=base_manifest.cycle, plain=True)
    with (
        closing(_open(model, manifest, batch, answers)) as ours,
        closing(_open(base, base_manifest, batch, answers)) as theirs,
    ):
        for group in filter(None, groups):
            prompts, count = [answer.prompt_ids for answer in group], min(len(answer.token_ids) for answer in group)
            if not rates:  # what a backend runs first is slower
                run_once(ours, cycles, prompts, vocab_size, count)
                run_once(theirs, every, prompts, vocab_size, count)
            plain = run_once(theirs, every, prompts, vocab_size, count)
            for confidence in wanted:
                run = run_once(ours, cycles, prompts, vocab_size, count, confidence)
                rates[confidence].append(run.decode_tok_per_s / plain.decode_tok_per_s)
    return {confidence: _range(rates[confidence] or [float("nan")]) for confidence in wanted}


def _range(values: Sequence[float]) -> Range:
    return float(np.median(values)), float(np.min(values)), float(np.max(values))


def _open(run: GenerationRun, manifest: Manifest, batch: int, answers: Sequence[Answer]) -> Backend:
    """With room for the longest of the answers, and no more: so many caches of the model's full length fill a machine."""
    room = max(len(answer.prompt_ids) + len(answer.token_ids) for answer in answers)
    return open_backend(run.bundle, manifest, replace(_options(run, batch), max_model_len=room))


def _options(run: GenerationRun, batch: int) -> BackendOptions:
    return BackendOptions(device=run.device, threads=run.threads, max_num_seqs=batch)


def _batch_of(manifest: Manifest) -> int:
    return min(MAX_BATCH, max(graph.slots for graph in manifest.graphs))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are equal before the first other one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))
