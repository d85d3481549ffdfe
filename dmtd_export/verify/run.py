"""The verification of a bundle from end to end: which levels can run, in what order, and the report.

    structure  always: files, manifest, weights, graph files (``structure``)
    graphs     ONNX Runtime on the CPU: the graphs against one another, whole cycles of every variant against the first
    oracle     PyTorch too: every graph and every whole cycle against the reference

A higher level contains the lower ones. What lowers the level is said in one line, never passed over in silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmtd_export.bundle.atomic import work_directory
from dmtd_export.bundle.split import spec_of
from dmtd_export.verify import cycles
from dmtd_export.verify.as_is import AsIs, as_is_runs, is_evaluated, margins_as_is, standard_graphs
from dmtd_export.verify.choice_checks import check_choose_token, check_sample_token
from dmtd_export.verify.chosen import check_chosen, picks
from dmtd_export.verify.exact import exact_twin
from dmtd_export.verify.expected import expected_cycles, expected_rows
from dmtd_export.verify.graph_checks import check_graphs, ordered
from dmtd_export.verify.graph_runs import open_onnxruntime
from dmtd_export.verify.half import float32_twin
from dmtd_export.verify.int8_caches import FollowedGraphs, Scales, cache_scales
from dmtd_export.verify.levels import Plan, make_plan, scratch_directory
from dmtd_export.verify.margins import (
    FLOAT32,
    FLOAT32_MARGIN,
    Margin,
    float32_margin,
    int8_margin_of,
    rounding_margin,
    rounds_inputs,
    told_margins,
)
from dmtd_export.verify.report import Check, Divergence, Level, VerificationError, VerifyReport, record
from dmtd_export.verify.scenario import Outcome, Scenario, make_scenario
from dmtd_export.verify.structure import check_structure, model_config, steps
from dmtd_export.verify.weights_check import check_architecture, check_rotary, check_source
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.checkpoints.tensors import tensor_shapes
from dmtd_models.config.model import ModelConfig
from dmtd_models.progress import Progress, silent
from dmtd_runtime.backends.onnxruntime.limits import runs_in_one_go
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest, load_manifest
from dmtd_runtime.errors import BackendError, BundleError

if TYPE_CHECKING:
    from dmtd_export.verify.reference import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What `dmtd verify` can be told. ``level`` None: the highest that can run here."""

    level: Level | None = None
    quick: bool = False


def verify_bundle(
    directory: Path,
    *,
    checkpoint: Checkpoint | None = None,
    level: Level | None = None,
    quick: bool = False,
    progress: Progress = silent,
) -> VerifyReport:
    """Verify the bundle at ``directory``; ``checkpoint`` is the source it was exported from, where that is at hand.

    ``progress`` is told (stage, steps done, steps of the stage). Raises BundleError where there is no bundle to verify;
    everything that is wrong with one stands in the report.
    """
    start = time.monotonic()
    manifest = load_manifest(directory)
    run = _Run(directory, manifest, checkpoint, quick, progress)
    plan = make_plan(directory, manifest, level, run.config)
    checks = run.structure()
    notes: list[str] = []
    reached: Level = "structure"
    if not all(check.ok for check in checks):
        notes.append("the structure is broken, so nothing was run")
    elif plan.level != "structure":
        reached = plan.level
        checks += run.weights()
        notes += [*plan.notes, *run.notes(plan)]
        checks += run.numbers(plan)
    elif checkpoint is not None:
        checks += run.weights()
    return VerifyReport(
        level=reached,
        level_note=plan.note,
        notes=tuple(notes),
        checks=tuple(checks),
        seconds=time.monotonic() - start,
        margins={"float32_of_max": FLOAT32_MARGIN, **told_margins(*margins_as_is(manifest))},
    )


def verify_hook(
    options: VerifyOptions,
    *,
    progress: Progress = silent,
    on_report: Callable[[VerifyReport], None] | None = None,
) -> Callable[[Path, Checkpoint], dict[str, Any]]:
    """The hook for ``export_bundle``: verifies, hands the report to ``on_report``, returns the manifest's record.

    The hook raises VerificationError, which names the first divergence, where the report is not ok.
    """

    def hook(directory: Path, checkpoint: Checkpoint) -> dict[str, Any]:
        report = verify_bundle(
            directory, checkpoint=checkpoint, level=options.level, quick=options.quick, progress=progress
        )
        if on_report is not None:
            on_report(report)
        if not report.ok:
            raise VerificationError(
                f"verification failed: {report.first_divergence}; "
                "the bundle was not kept (--no-verify keeps it unverified)"
            )
        return record(report)

    return hook


class _Run:
    """One verification: the bundle, and everything that its stages share."""

    def __init__(
        self, directory: Path, manifest: Manifest, checkpoint: Checkpoint | None, quick: bool, progress: Progress
    ) -> None:
        self.config: ModelConfig | None = checkpoint.config if checkpoint is not None else model_config(directory)
        self._directory = directory
        self._manifest = manifest
        self._checkpoint = checkpoint
        self._source = checkpoint
        self._quick = quick
        self._progress = progress
        self._twins: list[Path] = []

    def structure(self) -> list[Check]:
        with self._counting("structure", steps(self._manifest)) as done:
            checks = check_structure(self._directory, self._manifest, done)
        if self._checkpoint is not None:
            checks.append(check_architecture(self._manifest, self._checkpoint))
        return checks

    def weights(self) -> list[Check]:
        """The stored weights against the checkpoint's, where there is one."""
        if self._checkpoint is None:
            return []
        with self._counting("weights", len(tensor_shapes(self._checkpoint.config))) as done:
            check = check_source(self._directory, self._manifest, self._checkpoint, done)
        # Weights that are bit by bit the checkpoint's need not be read (a GGUF file: dequantised) once more.
        self._source = None if check.ok else self._checkpoint
        return [check]

    def notes(self, plan: Plan) -> Iterator[str]:
        dtype = self._manifest.model.dtype
        if plan.level == "oracle" and self._checkpoint is None:
            yield (
                "the reference read the bundle's own weights: "
                "that they are the model's rests on the recorded norms and probes"
            )
        if dtype == "bfloat16":
            evaluated = "and, in ONNX's reference evaluator, the standard ones as they are"
            how = evaluated if is_evaluated(self._manifest) else "only"
            yield f"bfloat16 graphs were run as their float32 cast {how}: the CPU has no bfloat16 kernels"
        if dtype == "float16":
            yield "float16 graphs were run as their float32 cast, and as they are (margin in ULP)"
        if rounds_inputs(self._manifest):
            and_as_they_are = "" if dtype == "bfloat16" else ", and as they are"
            yield (
                "graphs over quantised weights were run without rounding a product's inputs, against float32 over the same "
                f"weights{and_as_they_are}"
            )
        if self._manifest.quantised and standard_graphs(self._manifest):
            yield "standard graphs over quantised weights were run with ONNX Runtime's optimisations, and without"

    def numbers(self, plan: Plan) -> list[Check]:
        """Levels ``graphs`` and ``oracle``, over the bundle or its float32 twin."""
        checks: list[Check] = []
        reference = self._reference() if plan.level == "oracle" else None
        if reference is not None:
            rows = self._manifest.weights[contract.ROTARY_TABLES[0]].shape[0]
            checks.append(check_rotary(self._directory, self._manifest, reference.rotary_tables(rows)))
        with self._float32(plan) as (directory, manifest):
            scenario, scales = make_scenario(manifest.model.vocab_size), cache_scales(directory, manifest)
            try:
                with self._counting("reference", reference.reads if reference else 1) as done:
                    expected, follow = expected_rows(directory, manifest, reference, scenario, scales, done)
                checks += self._graphs(directory, manifest, scenario, expected, plan, scales, follow)
                if plan.cycles != "none":
                    checks += self._cycles(directory, manifest, reference, plan)
            except (BackendError, BundleError) as error:
                found = Divergence(graph="ONNX Runtime", detail=str(error))
                checks.append(
                    Check(
                        name="ONNX Runtime runs the graphs",
                        level=plan.level,
                        ok=False,
                        detail=str(error),
                        divergence=found,
                    )
                )
        return [self._by_files(check) for check in checks]

    def _by_files(self, check: Check) -> Check:
        """The check with graphs named by their files: the paths in ONNX Runtime's messages may be a twin's, which goes."""

        def shown(text: str) -> str:
            for place in (*self._twins, self._directory.absolute()):
                text = text.replace(f"{place}/", "")
            return text

        found = check.divergence
        return replace(
            check, detail=shown(check.detail), divergence=found and replace(found, detail=shown(found.detail))
        )

    def _reference(self) -> Reference:
        from dmtd_export.verify.reference import Reference

        assert self.config is not None, "the plan lowers the level where there is no config"
        return Reference(self.config, spec_of(self._manifest.cycle), self._directory, self._manifest, self._source)

    @contextmanager
    def _float32(self, plan: Plan) -> Iterator[tuple[Path, Manifest]]:
        """The bundle itself, or a twin in a temporary directory beside it: of half precision its float32 cast, of quantised
        weights one that rounds no inputs.
        """
        if rounding_margin(self._manifest) is None:
            yield self._directory, self._manifest
            return
        # Beside the bundle and locked, so that the next export or verification removes what a killed one left.
        with self._work_directory() as target:
            directory, manifest = self._directory, self._manifest
            if manifest.model.dtype != "float32":
                directory, manifest = target, float32_twin(directory, manifest, target, self.config)
            if rounds_inputs(self._manifest):
                manifest = exact_twin(directory, manifest, target, in_floats=plan.in_floats)
            yield target, manifest

    @contextmanager
    def _work_directory(self) -> Iterator[Path]:
        with work_directory(scratch_directory(self._directory) / self._directory.resolve().name) as twin:
            self._twins.append(twin)
            yield twin

    def _graphs(
        self,
        directory: Path,
        manifest: Manifest,
        scenario: Scenario,
        expected: Outcome,
        plan: Plan,
        scales: Scales,
        follow: FollowedGraphs | None,
    ) -> list[Check]:
        cast = "" if self._manifest.model.dtype == "float32" else ", cast to float32,"
        label, open_exact = cast, open_onnxruntime
        if rounds_inputs(self._manifest):
            label, open_exact = f"{cast or ','} inputs not rounded,", partial(open_onnxruntime, prepack=True)
        # ONNX Runtime puts other nodes in the place of DequantizeLinear and what reads it, and has erred in that.
        plain = tuple(graph for graph in ordered(manifest) if manifest.quantised and graph.dialect == contract.STANDARD)
        as_is = as_is_runs(self._manifest)
        runs = sum(len(one.graphs) for one in as_is)
        with self._counting("graphs", len(ordered(manifest)) + len(plain) + runs) as done:
            checks = check_graphs(
                directory,
                manifest,
                scenario,
                expected,
                plan.level,
                self._closest(follow, scales),
                label,
                done,
                open_exact,
                scales,
                follow,
            )
            checks += check_graphs(
                directory,
                replace(manifest, graphs=plain),
                scenario,
                expected,
                plan.level,
                FLOAT32,
                ", not optimised,",
                done,
                partial(open_onnxruntime, optimise=False),
            )
            checks += check_choose_token(directory, manifest, plan.level)
            checks += check_sample_token(directory, manifest, plan.level)
            for one in as_is:
                checks += self._graphs_as_is(one, scenario, expected, plan.level, done, scales, follow)
        return checks

    def _graphs_as_is(
        self,
        run: AsIs,
        scenario: Scenario,
        expected: Outcome,
        level: Level,
        done: Callable[..., None],
        scales: Scales,
        follow: FollowedGraphs | None,
    ) -> list[Check]:
        with ExitStack() as opened:
            directory, manifest = self._directory, replace(self._manifest, graphs=run.graphs)
            if run.twin:
                directory = opened.enter_context(self._work_directory())
                manifest = exact_twin(self._directory, manifest, directory, in_floats=False)
            return check_graphs(
                directory,
                manifest,
                scenario,
                expected,
                level,
                run.margin,
                run.label,
                done,
                run.open_session,
                scales,
                follow.within(run.margin.limit) if follow else None,
            )

    def _cycles(self, directory: Path, manifest: Manifest, reference: Reference | None, plan: Plan) -> list[Check]:
        dtype = self._manifest.model.dtype
        runs_as_is = dtype == "float16" or (rounds_inputs(self._manifest) and dtype == "float32")
        quick = self._quick or plan.cycles == "few"
        variants = cycles.make_variants(manifest, quick, plan.prepack)
        made = cycles.make_cases(manifest, quick)
        reads = reference.reads if reference is not None else 0
        in_one = [replace(one, prepack=plan.prepack) for one in cycles.cycle_graph_variants(self._manifest)]
        as_is = [replace(one, kernels=True) for one in (variants[0], *in_one)] if runs_as_is else []
        choosing = in_one if runs_in_one_go(self._manifest) else []
        runs = sum(len(variant.picks(len(made))) for variant in (*variants, *as_is))
        runs += sum(len(picks(variant, made)) for variant in choosing)
        with self._counting("cycles", runs + reads) as done:
            cases, own = cycles.choose_tokens(directory, manifest, variants[0], made, done)
            expected = cycles.Expected(logits=[ran.logits for ran in own], level="graphs")
            scales = cache_scales(directory, manifest)
            if reference is not None:
                expected = expected_cycles(reference, cases, own, scales, done)
            margin = self._closest(expected.follow, scales)
            checks = []
            for variant in variants:
                given = own if variant is variants[0] else None
                if given is None or reference is not None:
                    check = cycles.check_cycles(
                        directory, manifest, variant, cases, expected, margin, given, on_cases=done
                    )
                    checks.append(check)
            if runs_as_is:
                rounded = rounding_margin(self._manifest)
                what = "int8 inputs" if rounds_inputs(self._manifest) else "float16"
                assert rounded is not None, "graphs that are run as they are have a margin of their own"
                label, bundle = f", {what} as it is", (self._directory, self._manifest)
                if expected.follow is not None:
                    expected = replace(expected, follow=expected.follow.within(rounded.limit))
                for variant in as_is:
                    checks.append(
                        cycles.check_cycles(*bundle, variant, cases, expected, rounded, label=label, on_cases=done)
                    )
            for variant in choosing:
                checks.append(check_chosen(directory, manifest, variant, cases, plan.level, margin, on_cases=done))
        return checks

    def _closest(self, follow: object, scales: Scales) -> Margin:
        """The margin of graphs that round no inputs. Int8 caches whose codes nobody follows may differ by ties."""
        if scales and follow is None:
            return int8_margin_of(self._manifest)
        return float32_margin(self._manifest.model.num_layers)

    @contextmanager
    def _counting(self, stage: str, total: int) -> Iterator[Callable[..., None]]:
        count = 0
        self._progress(stage, 0, total)

        def done(more: int = 1) -> None:
            nonlocal count
            if count < total:  # a reference that follows codes reads more often than is foreseen, and in later stages
                count = min(count + more, total)
                self._progress(stage, count, total)

        yield done
        count = total
        self._progress(stage, total, total)
