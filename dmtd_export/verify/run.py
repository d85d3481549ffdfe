"""The verification of a bundle from end to end: which levels can run, in what order, and the report.

    structure  always: files, manifest, weights, graph files (``structure``)
    graphs     ONNX Runtime on the CPU: the graphs against one another, whole cycles of every variant against the first
    oracle     PyTorch too: every graph and every whole cycle against the reference

A higher level contains the lower ones. What lowers the level is said in one line, never passed over in silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmtd_export.bundle.atomic import work_directory
from dmtd_export.bundle.split import spec_of
from dmtd_export.verify import cycles
from dmtd_export.verify.choice_checks import check_choose_token, check_sample_token
from dmtd_export.verify.exact import exact_twin
from dmtd_export.verify.expected import expected_cycles, expected_rows
from dmtd_export.verify.graph_checks import check_graphs, ordered
from dmtd_export.verify.graph_runs import OpenSession, open_evaluator, open_onnxruntime
from dmtd_export.verify.half import float32_twin
from dmtd_export.verify.int8_caches import FollowedGraphs, Scales, cache_scales
from dmtd_export.verify.levels import Plan, float32_bytes, make_plan, scratch_directory
from dmtd_export.verify.margins import FLOAT32, FLOAT32_MARGIN, Margin, int8_margin, rounding_margin, told_margins
from dmtd_export.verify.report import Check, Divergence, Level, VerificationError, VerifyReport, record
from dmtd_export.verify.scenario import Outcome, Scenario, make_scenario
from dmtd_export.verify.structure import check_structure, model_config, steps
from dmtd_export.verify.weights_check import check_architecture, check_rotary, check_source
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.checkpoints.tensors import tensor_shapes
from dmtd_models.config.model import ModelConfig
from dmtd_models.progress import Progress, silent
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest, load_manifest
from dmtd_runtime.errors import BackendError, BundleError

if TYPE_CHECKING:
    from dmtd_export.verify.reference import Reference

EVALUATOR_BYTES = 16 << 20  # float32 bytes of the largest model that ONNX's reference evaluator is asked to run


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
        margins={"float32_of_max": FLOAT32_MARGIN, **told_margins(manifest)},
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
            how = "and, in ONNX's reference evaluator, the standard ones as they are" if self._evaluates() else "only"
            yield f"bfloat16 graphs were run as their float32 cast {how}: the CPU has no bfloat16 kernels"
        if dtype == "float16":
            yield "float16 graphs were run as their float32 cast, and as they are (margin in ULP)"
        if self._rounds_inputs:
            yield (
                "graphs over quantised weights were run without rounding a product's inputs, against float32 over the same "
                "weights, and as they are"
            )
        if self._manifest.quantised and self._standard:
            yield "standard graphs over quantised weights were run with ONNX Runtime's optimisations, and without"

    @property
    def _rounds_inputs(self) -> bool:
        """Whether graphs round the inputs of products over quantised weights."""
        kinds = {graph.dialect for graph in self._manifest.decoder_graphs}
        return bool(self._manifest.quantised) and contract.ONNXRUNTIME in kinds

    @property
    def _standard(self) -> tuple[GraphInfo, ...]:
        return tuple(graph for graph in ordered(self._manifest) if graph.dialect == contract.STANDARD)

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
                with self._counting("reference", len(tensor_shapes(reference.config)) if reference else 1) as done:
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
        return checks

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
        with work_directory(scratch_directory(self._directory) / self._directory.resolve().name) as target:
            if self._rounds_inputs:
                yield target, exact_twin(self._directory, self._manifest, target, in_floats=plan.in_floats)
            else:
                yield target, float32_twin(self._directory, self._manifest, target, self.config)

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
        label, open_exact = "" if directory == self._directory else ", cast to float32,", open_onnxruntime
        if self._rounds_inputs:
            label, open_exact = ", inputs not rounded,", partial(open_onnxruntime, prepack=True)
        as_is, label_as_is, open_session = self._as_is()
        # ONNX Runtime puts other nodes in the place of DequantizeLinear and what reads it, and has erred in that.
        plain = tuple(graph for graph in ordered(manifest) if manifest.quantised and graph.dialect == contract.STANDARD)
        with self._counting("graphs", len(ordered(manifest)) + len(plain) + len(ordered(as_is))) as done:
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
            if as_is.graphs and (rounded := rounding_margin(as_is)) is not None:
                checks += check_graphs(
                    self._directory,
                    as_is,
                    scenario,
                    expected,
                    plan.level,
                    rounded,
                    label_as_is,
                    done,
                    open_session,
                    scales,
                    follow.within(rounded.limit) if follow else None,
                )
        return checks

    def _as_is(self) -> tuple[Manifest, str, OpenSession]:
        """The graphs in half precision or with rounded inputs that can run as they are, and in what."""
        if self._rounds_inputs:
            # The kernels do not know of slots, and their graphs are held to the closer margin above.
            own = (graph for graph in ordered(self._manifest) if graph.dialect == contract.ONNXRUNTIME)
            single = tuple(graph for graph in own if graph.slots == 1)
            return replace(self._manifest, graphs=single), ", as it is,", partial(open_onnxruntime, prepack=True)
        if self._manifest.model.dtype == "float16":
            return self._manifest, ", as it is,", open_onnxruntime
        evaluated = replace(self._manifest, graphs=self._standard if self._evaluates() else ())
        return evaluated, ", as it is in ONNX's evaluator,", open_evaluator

    def _evaluates(self) -> bool:
        """Whether a bfloat16 bundle is small enough for the evaluator, which multiplies element by element."""
        return self._manifest.model.dtype == "bfloat16" and float32_bytes(self._manifest) <= EVALUATOR_BYTES

    def _cycles(self, directory: Path, manifest: Manifest, reference: Reference | None, plan: Plan) -> list[Check]:
        runs_as_is = self._rounds_inputs or self._manifest.model.dtype == "float16"
        quick = self._quick or plan.cycles == "few"
        variants = cycles.make_variants(manifest, quick, plan.prepack)
        made = cycles.make_cases(manifest, quick)
        reads = len(tensor_shapes(reference.config)) if reference is not None else 0
        runs = sum(len(variant.picks(len(made))) for variant in variants) + runs_as_is * len(made)
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
                rounded, what = rounding_margin(self._manifest), "int8 inputs" if self._rounds_inputs else "float16"
                assert rounded is not None, "graphs that are run as they are have a margin of their own"
                label, bundle = f", {what} as it is", (self._directory, self._manifest)
                if expected.follow is not None:
                    expected = replace(expected, follow=expected.follow.within(rounded.limit))
                checks.append(
                    cycles.check_cycles(*bundle, variants[0], cases, expected, rounded, label=label, on_cases=done)
                )
        return checks

    def _closest(self, follow: object, scales: Scales) -> Margin:
        """The margin of graphs that round no inputs. Int8 caches whose codes nobody follows may differ by ties."""
        return int8_margin(self._manifest.model.num_layers) if scales and follow is None else FLOAT32

    @contextmanager
    def _counting(self, stage: str, total: int) -> Iterator[Callable[..., None]]:
        count = 0
        self._progress(stage, 0, total)

        def done(more: int = 1) -> None:
            nonlocal count
            count += more
            self._progress(stage, min(count, total), total)

        yield done
        self._progress(stage, total, total)
