"""Whole cycles: prompts through prefill, heads, late steps and refills by the runtime's own plan and backend.

One variant (the baseline) chooses tokens greedily. Every variant, the baseline included, is then fed those tokens,
and each of its rows of logits is held to the expected ones: the oracle's, or the baseline's where there is no oracle.
All rows agreeing, in logits and in the token they choose, is the same as free greedy runs agreeing, by induction.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.verify.forced import forced_logits
from dmtd_export.verify.int8_caches import FollowedCycles
from dmtd_export.verify.margins import FLOAT32, Margin, log_softmax, top_two_gap, worst_difference
from dmtd_export.verify.report import Check, Divergence, Level
from dmtd_runtime.backends.base import Backend, BackendOptions, FullPass
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.errors import BackendError, BundleError

Array = np.ndarray[Any, np.dtype[Any]]
OnCases = Callable[[int], None]
STAGED: FullPass = "staged"
FUSED: FullPass = "fused"
SMALL_CHUNK = 3  # prefill rows a run where a variant chunks its prompts
STANDARD_BATCH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt in one mode, and the tokens that follow it (empty before the baseline has run).

    ``heads``, where they are not those of fixed cycles; those of ``leaves`` come early, behind a late step that is kept or in
    place of one.
    """

    prompt: tuple[int, ...]
    plain: bool
    num_new: int
    continuation: tuple[int, ...] = ()
    heads: tuple[int, ...] | None = None
    leaves: tuple[int, ...] = ()

    @property
    def sequence(self) -> tuple[int, ...]:
        """Every token that is fed: the last new one is chosen, but not fed."""
        return self.prompt + self.continuation[:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the bundle. ``chunk`` bounds the prefill rows of a run, ``full_pass`` None: the cycle graph runs all."""

    dialect: contract.Dialect
    full_pass: FullPass | None
    batch: int
    chunk: int
    case_step: int = 1  # runs every case_step-th case
    prepack: bool = True
    kernels: bool = False  # the runtime's own, as a bundle is deployed; they take no twin, which rounds nothing

    @property
    def name(self) -> str:
        chunked = f", chunks of {self.chunk}" if self.chunk <= SMALL_CHUNK else ""
        return f"whole cycles: {self.dialect}, {self.full_pass or 'one graph'}, batch {self.batch}{chunked}"

    def picks(self, count: int) -> range:
        """Which of ``count`` cases it runs."""
        return range(0, count, self.case_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Logits [num_new, vocab] of each case, and whose they are.

    ``follow``: over int8 caches, those of some cases with what then stands in the caches, and a line about it.
    """

    logits: Sequence[Array]
    level: Level
    follow: FollowedCycles | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A case's logits [num_new, vocab], and what stands in its int8 caches at the end, [2 * layers, kv_heads, rows, head_dim]."""

    logits: Array
    codes: Array | None = None


def make_cases(manifest: Manifest, quick: bool, seed: int = 0) -> list[Case]:
    """Prompts around multiples of the cycle length, long enough to pass two heads, in DMTD and in plain mode."""
    tau, limit = manifest.cycle.cycle_length, manifest.model.max_model_len
    lengths = {tau + 1, 2 * tau} if quick else {1, tau - 1, tau, tau + 1, 2 * tau, 3 * tau + 2}
    rng = np.random.default_rng(seed)
    cases = []
    for length in sorted(n for n in lengths if n >= 1):
        length, new = min(length, max(1, limit - 1)), max(1, min(2 * tau + 1, limit - length))
        prompt = tuple(rng.integers(0, manifest.model.vocab_size, length).tolist())
        cases.append(Case(prompt=prompt, plain=False, num_new=new))
    # Plain mode knows no phase, so two lengths say as much as all of them.
    plain = [replace(case, plain=True) for case in (cases[len(cases) // 2], cases[-1])]
    adaptive = [leaving(case, tau, rng) for case in cases[-1 if quick else -2 :] if tau > 1]
    return [*cases, *plain, *(adaptive if manifest.cycle.cycle_origin == "prompt" else ())]


def leaving(case: Case, tau: int, rng: np.random.Generator) -> Case:
    """The case with cycles of 1 to ``tau`` positions, the first two left early; heads are listed further than it goes."""
    heads, leaves, at = [], [], len(case.prompt)
    lengths = itertools.chain((tau - 1, tau - 1), map(int, iter(lambda: rng.integers(1, tau + 1), None)))
    while at < len(case.prompt) + case.num_new + 8 * tau:
        heads.append(at)
        length = next(lengths)
        at += length
        leaves += [at] if length < tau else []
    return replace(case, heads=tuple(heads), leaves=tuple(leaves))


def make_variants(manifest: Manifest, quick: bool, prepack: bool = True) -> list[Variant]:
    """The baseline first, then every dialect, full-pass mode and batch that the bundle has graphs for."""
    slots = {d: max((g.slots for g in manifest.decoder_graphs if g.dialect == d), default=0) for d in contract.DIALECTS}
    whole = manifest.model.max_window
    variants: list[Variant] = []
    for dialect in (contract.ONNXRUNTIME, contract.STANDARD):
        if not slots[dialect]:
            continue
        many = STANDARD_BATCH if dialect == contract.STANDARD else slots[dialect]
        baseline = not variants
        variants.append(
            Variant(dialect=dialect, full_pass=STAGED, batch=1, chunk=whole, case_step=1 if baseline else 3)
        )
        if many > 1:
            variants.append(Variant(dialect=dialect, full_pass=STAGED, batch=many, chunk=SMALL_CHUNK))
        if dialect == contract.ONNXRUNTIME:
            variants += cycle_graph_variants(manifest)
        if not quick:
            variants.append(Variant(dialect=dialect, full_pass=FUSED, batch=1, chunk=SMALL_CHUNK, case_step=3))
            if many > 1:
                variants.append(Variant(dialect=dialect, full_pass=FUSED, batch=many, chunk=whole))
    return [replace(variant, prepack=prepack) for variant in variants]


def cycle_graph_variants(manifest: Manifest) -> list[Variant]:
    """Every cycle graph, with as many sequences as it is for: fewer cases between the smallest and the largest."""
    slots = sorted(graph.slots for graph in manifest.graphs if graph.name == contract.CYCLE)
    usual = Variant(dialect=contract.ONNXRUNTIME, full_pass=None, batch=1, chunk=SMALL_CHUNK)
    return [replace(usual, batch=n, case_step=1 if n in (slots[0], slots[-1]) else 3) for n in slots]


def choose_tokens(
    directory: Path, manifest: Manifest, variant: Variant, cases: Sequence[Case], on_cases: OnCases = lambda count: None
) -> tuple[list[Case], list[Ran]]:
    """Let ``variant`` continue every case greedily. Returns the cases with their tokens, and what ran."""
    ran = list(run_variant(directory, manifest, variant, cases, on_cases))
    chosen = [
        replace(case, continuation=tuple(int(i) for i in each.logits.argmax(-1)))
        for case, each in zip(cases, ran, strict=True)
    ]
    return chosen, ran


def check_cycles(
    directory: Path,
    manifest: Manifest,
    variant: Variant,
    cases: Sequence[Case],
    expected: Expected,
    margin: Margin = FLOAT32,
    own: Sequence[Ran] | None = None,
    label: str = "",
    on_cases: OnCases = lambda count: None,
) -> Check:
    """Hold one variant to the expected logits; ``own`` is the baseline's, which has already run."""
    picked = range(0, len(cases)) if own is not None else variant.picks(len(cases))
    name = variant.name + label
    try:
        got = own or list(run_variant(directory, manifest, variant, [cases[i] for i in picked], on_cases))
    except (BackendError, BundleError) as error:
        return _failed(name, variant, expected.level, str(error))
    found = Comparison(variant=variant, margin=margin)
    wanted, told = [expected.logits[i] for i in picked], ""
    if expected.follow is not None:
        wanted, told = expected.follow(picked, [each.codes for each in got])
    for i, rows, each in zip(picked, wanted, got, strict=True):
        found.add(cases[i], rows, each.logits)
    check = found.check(name, expected.level)
    return replace(check, detail="; ".join(filter(None, (check.detail, told))))


@contextlib.contextmanager
def opened(
    directory: Path, manifest: Manifest, variant: Variant, cases: Sequence[Case]
) -> Iterator[OnnxRuntimeBackend]:
    """The backend of a variant, with room for the cases."""
    longest = max(len(case.prompt) + case.num_new for case in cases)
    options = BackendOptions(
        dialect=variant.dialect,
        full_pass=variant.full_pass,
        max_num_seqs=variant.batch,
        max_model_len=min(longest, manifest.model.max_model_len),
        prepack=variant.prepack,
        kernels=variant.kernels,
    )
    backend = OnnxRuntimeBackend(directory, manifest, options)
    try:
        yield backend
    finally:
        backend.close()


def run_variant(
    directory: Path, manifest: Manifest, variant: Variant, cases: Sequence[Case], on_cases: OnCases = lambda count: None
) -> Iterator[Ran]:
    """Yield what each case gives, in order. ``on_cases`` is told how many more have run."""
    with opened(directory, manifest, variant, cases) as backend:
        results: dict[int, Ran] = {}
        in_codes = manifest.model.cache_dtype == "int8"
        for plain in (False, True):
            wanted = [i for i, case in enumerate(cases) if case.plain == plain]
            for start in range(0, len(wanted), variant.batch):
                group = wanted[start : start + variant.batch]
                plan = CyclePlan(cycle=manifest.cycle, plain=plain)
                chosen = [cases[i] for i in group]
                rows = forced_group(
                    backend, plan, variant.chunk, chosen, manifest.model.vocab_size, with_codes=in_codes
                )
                results.update(zip(group, rows, strict=True))
                on_cases(len(group))
    yield from (results[i] for i in range(len(cases)))


def forced_group(
    backend: Backend,
    plan: CyclePlan,
    max_rows: int,
    cases: Sequence[Case],
    vocab_size: int,
    *,
    with_codes: bool = False,
) -> list[Ran]:
    """What some cases give, run as one batch."""
    codes: dict[int, Array] = {}
    logits = forced_logits(
        backend,
        plan,
        [case.prompt for case in cases],
        [case.continuation for case in cases],
        [case.num_new for case in cases],
        vocab_size=vocab_size,
        max_rows=max_rows,
        leaves=[case.leaves for case in cases],
        on_caches=codes.__setitem__ if with_codes else None,
    )
    return [Ran(logits=rows, codes=codes.get(number)) for number, rows in enumerate(logits)]


def _failed(name: str, variant: Variant, level: Level, detail: str) -> Check:
    found = Divergence(graph="whole cycles", dialect=variant.dialect, detail=detail)
    return Check(name=name, level=level, ok=False, detail=detail, divergence=found)


class Comparison:
    """Collects worst error, near-ties and the first divergence of a variant."""

    def __init__(self, *, variant: Variant, margin: Margin) -> None:
        self._variant = variant
        self._margin = margin
        self._worst = 0.0
        self._near_ties: list[str] = []
        self._rows = 0
        self._agreed = 0
        self._divergence_nats = 0.0  # Kullback-Leibler, expected against got
        self._loss_nats = 0.0  # what the tokens that follow cost more than by the expected logits
        self._first: Divergence | None = None

    def add(self, case: Case, expected: Array, got: Array) -> None:
        largest = float(np.abs(expected).max())
        for step, (wanted, row) in enumerate(zip(expected, got, strict=True)):
            self._rows += 1
            apart = worst_difference(wanted, row, self._margin, largest)
            self._worst = max(self._worst, apart.error)
            position = len(case.prompt) - 1 + step  # of the row that was fed
            token, best = int(row.argmax()), int(wanted.argmax())
            self._agreed += token == best
            if self._margin.agreement is not None:
                self._add_nats(wanted, row, case.continuation[step])
            if apart.error > self._margin.limit:
                self._diverged(
                    case, position, apart.expected, apart.got, f"{apart.error:.3g} {self._margin.unit} in the logits"
                )
            elif token != best:
                gap = top_two_gap(wanted) / self._margin.scale(largest)
                # Within the margin a row can move its best down and another one up, each by the limit.
                if gap <= self._margin.limit:
                    self._near_ties.append(
                        f"position {position}: {best} or {token}, {gap:.2g} {self._margin.unit} apart"
                    )
                elif self._margin.agreement is None:
                    self._diverged(case, position, str(best), str(token), "token")

    def _add_nats(self, expected: Array, got: Array, token: int) -> None:
        wanted, found = log_softmax(expected), log_softmax(got)
        self._divergence_nats += float((np.exp(wanted) * (wanted - found)).sum())
        self._loss_nats += float(wanted[token] - found[token])

    def _diverged(self, case: Case, position: int, expected: float | str, got: float | str, what: str) -> None:
        if self._first is None:
            mode = "plain" if case.plain else "adaptive" if case.leaves else "dmtd"
            how = f"{self._variant.full_pass or 'one graph'}, batch {self._variant.batch}"
            detail = f"{what}; {mode} mode, prompt of {len(case.prompt)}, {how}"
            self._first = Divergence(
                graph="whole cycles",
                dialect=self._variant.dialect,
                position=position,
                expected=expected,
                got=got,
                detail=detail,
            )

    def check(self, name: str, level: Level) -> Check:
        least, rows = self._margin.agreement, max(1, self._rows)
        enough = self._margin.least_agreement(rows)
        if least is not None and self._first is None and self._agreed < enough * self._rows:
            self._first = Divergence(
                graph="whole cycles",
                dialect=self._variant.dialect,
                expected=enough,
                got=self._agreed / rows,
                detail="top-1 agreement with float32",
            )
        detail = "" if self._first is None else str(self._first)
        if self._near_ties and not detail:
            detail = f"near-ties: {'; '.join(self._near_ties[:3])}"
        if least is not None:
            shown = (
                f"top-1 agreement {self._agreed}/{self._rows}, KL {self._divergence_nats / rows:.1e}, "
                f"perplexity x{math.exp(self._loss_nats / rows):.4f}"
            )
            detail = shown + (f"; {detail}" if detail else "")
        return Check(
            name=name,
            level=level,
            ok=self._first is None,
            worst=self._worst,
            margin=self._margin.limit,
            unit=self._margin.unit,
            cases=self._rows,
            detail=detail,
            near_ties=len(self._near_ties),
            divergence=self._first,
        )
