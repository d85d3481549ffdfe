"""`dmtd verify` with engines (`--backend`) or `--device cuda`: a bundle as a device runs it, against the float32 oracle.

1. Step by step, batch 1 and the largest: every row of logits, teacher-forced, within the margin of the type (ULP), and the
   share of rows that choose the oracle's token.
2. Whole cycles as they are generated, captured and replayed: the tokens that came out are fed to the oracle, and each must be
   its arg-max, or closer to it than the margin. What diverges first is named.

The backend comes from ``dmtd_runtime``; the structure and the CPU's numbers are ``run``'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmtd_export.bundle.split import spec_of
from dmtd_export.errors import ExportError
from dmtd_export.verify.cycles import Array, Case, Comparison, Variant, forced_group, make_cases
from dmtd_export.verify.forced import LeavingRun
from dmtd_export.verify.levels import installed
from dmtd_export.verify.margins import Margin, float32_margin, rounding_margin, told_margins
from dmtd_export.verify.report import Check, VerifyReport
from dmtd_export.verify.structure import model_config
from dmtd_models.progress import Progress, counter, silent
from dmtd_runtime.backends.base import Backend, BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import run_batch
from dmtd_runtime.serving.sequence import TokenEvent

if TYPE_CHECKING:
    from dmtd_export.verify.reference import Reference

CYCLES_GENERATED = 4  # of each case: the first runs call by call, the second is captured, the others are replays
LARGEST_BATCH = 8


def largest_batch(manifest: Manifest) -> int:
    """The largest batch to check of a bundle where nothing else is said."""
    return min(LARGEST_BATCH, manifest.max_num_seqs or LARGEST_BATCH)


def verify_on_device(
    directory: Path,
    options: BackendOptions,
    *,
    quick: bool = False,
    engines: Path | None = None,
    progress: Progress = silent,
) -> VerifyReport:
    """Hold a bundle, run as ``options`` say, to the oracle over the bundle's own weights.

    Args:
        directory: the bundle.
        options: backend and device; ``max_num_seqs`` is the largest batch that is checked.
        quick: fewer prompts.
        engines: the directory of the engines to run; by default those of the bundle that fit.
        progress: told (check, prompts done, prompts of the check).

    Raises:
        ExportError: PyTorch is missing, or the bundle's weights are not a model that it knows.
        BundleError, BackendError, RequestError: the bundle or the device cannot be used.
    """
    start, manifest = time.monotonic(), open_bundle(directory)
    reference = _reference(directory, manifest)
    dialect = _dialect(options, manifest)
    rounded = rounding_margin(manifest, dialect, options.device)
    margin = rounded or float32_margin(manifest.model.num_layers)
    cases = make_cases(manifest, quick)
    checks: list[Check] = []
    # The largest first: what the engines or the device do not take is then said before any work is done.
    for batch in sorted({1, options.max_num_seqs}, reverse=True):
        backend = open_backend(directory, manifest, replace(options, max_num_seqs=batch), engines=engines)
        work = _Work(
            backend=backend, manifest=manifest, reference=reference, cases=cases, margin=margin, options=options
        )
        found = []
        try:
            for name, run in (("step by step", _steps), ("generated", _generations)):
                found.append(run(work, counter(progress, f"{name}, {backend.full_pass}, batch {batch}", len(cases))))
        finally:
            backend.close()
        checks = [*found, *checks]  # told from batch 1 on, where a divergence is simplest
    return VerifyReport(
        level="oracle",
        level_note="",
        notes=(f"run by {_name(options)}; the bundle itself is checked by dmtd verify without options",),
        checks=tuple(checks),
        seconds=time.monotonic() - start,
        margins=told_margins(rounded) or {"float32_of_max": margin.limit},
    )


def _reference(directory: Path, manifest: Manifest) -> Reference:
    if not installed("torch"):
        raise ExportError('verifying a device needs PyTorch, its reference; run: pip install "dmtd[oracle]"')
    from dmtd_export.verify.reference import Reference

    config = model_config(directory)
    if config is None:
        raise ExportError(f"{directory}: config.json does not describe the model; export the bundle again")
    return Reference(config, spec_of(manifest.cycle), directory, manifest, None)


def _dialect(options: BackendOptions, manifest: Manifest) -> contract.Dialect:
    """That of the graphs that run: engines are made from the standard one."""
    return contract.STANDARD if options.runs_engines else options.dialect or manifest.default_dialect


def _name(options: BackendOptions) -> str:
    if options.runs_engines:
        return f"engines of {options.backend}"
    return f"ONNX Runtime on {options.device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """An open backend, and what it is held to."""

    backend: Backend
    manifest: Manifest
    reference: Reference
    cases: Sequence[Case]
    margin: Margin
    options: BackendOptions

    @property
    def variant(self) -> Variant:
        return Variant(
            dialect=_dialect(self.options, self.manifest),
            full_pass=self.backend.full_pass,
            batch=self.backend.slots,
            chunk=self.manifest.model.max_window,
        )

    def named(self, check: str) -> str:
        return f"{check}: {_name(self.options)}, {self.backend.full_pass}, batch {self.backend.slots}"

    def groups(self) -> Iterator[tuple[CyclePlan, list[Case]]]:
        """Cases of one mode that run together."""
        batch = self.backend.slots
        for plain in (False, True):
            plan = CyclePlan(cycle=self.manifest.cycle, plain=plain)
            wanted = [case for case in self.cases if case.plain == plain]
            yield from ((plan, wanted[i : i + batch]) for i in range(0, len(wanted), batch))

    def expected(self, case: Case) -> Array:
        """The oracle's logits [new, vocab] behind the prompt and each token but the last."""
        [rows] = self.reference.teacher_forced([case.sequence], [len(case.prompt)], [case.plain], [case.heads])
        return rows[len(case.prompt) - 1 :]


def _steps(work: _Work, done: Callable[[int], None]) -> Check:
    """Every row of logits, the device's own tokens fed back to both."""
    backend, vocab_size = work.backend, work.manifest.model.vocab_size
    found = Comparison(variant=work.variant, margin=work.margin)
    for plan, group in work.groups():
        for case, ran in zip(group, forced_group(backend, plan, backend.max_rows, group, vocab_size), strict=True):
            chosen = replace(case, continuation=tuple(int(token) for token in ran.logits.argmax(-1)))
            found.add(chosen, work.expected(chosen), ran.logits)
            done(1)
    return found.check(work.named("step by step"), "oracle")


def _generations(work: _Work, done: Callable[[int], None]) -> Check:
    """The tokens of free greedy generation: one row of the oracle for each, its chosen token raised to its best."""
    agreed, total, near, first = 0, 0, 0, ""
    backend, margin = work.backend, work.margin
    cycles = backend.stats.cycles
    for plan, group in work.groups():
        for case, tokens in zip(group, _generate(backend, plan, work.manifest, group), strict=True):
            rows = work.expected(replace(case, continuation=tokens))
            scale = margin.scale(float(np.abs(rows).max()))
            for step, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                total, best = total + 1, int(row.argmax())
                agreed += token == best
                gap = float(row[best] - row[token]) / scale
                # Within the margin a row can move its best down and another one up, each by the limit.
                near += 0 < gap <= 2 * margin.limit
                if gap > 2 * margin.limit and not first:
                    first = (
                        f"{'plain' if plan.plain else 'dmtd'} mode, prompt of {len(case.prompt)}, token {step}: expected {best}, "
                        f"got {token}, {gap:.3g} {margin.unit} below"
                    )
            done(1)
    cycles = backend.stats.cycles - cycles
    detail = f"top-1 agreement {agreed}/{total}, {cycles} whole cycles" + (f"; {first}" if first else "")
    ok = not first and agreed >= margin.least_agreement(max(1, total)) * total
    return Check(
        name=work.named("generated"),
        level="oracle",
        ok=ok,
        margin=margin.limit,
        unit=margin.unit,
        cases=total,
        detail=detail,
        near_ties=near,
    )


def _generate(backend: Backend, plan: CyclePlan, manifest: Manifest, cases: Sequence[Case]) -> list[tuple[int, ...]]:
    """Greedy tokens of a batch through the product's own loop."""
    told: list[list[TokenEvent]] = [[] for _ in cases]
    wanted = CYCLES_GENERATED * manifest.cycle.cycle_length + 1
    sequences = []
    for case, events in zip(cases, told, strict=True):
        room = backend.max_model_len - len(case.prompt)
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max(1, min(wanted, room)))
        sampler = Sampler(params, vocab_size=manifest.model.vocab_size, prompt_ids=case.prompt, seed=0)
        run = LeavingRun(
            ids=list(case.prompt),
            sampler=sampler,
            stops=StopRules(params),
            on_event=events.append,
            leaves=case.leaves,
        )
        sequences.append(run)
    run_batch(backend, plan, sequences)
    for events in told:
        if events[-1].error is not None:
            raise events[-1].error
    return [tuple(event.choice.token_id for event in events if event.choice) for events in told]
