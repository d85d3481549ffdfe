"""What an evaluation found: as JSON for machines, as a table for people. No measuring here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmtd_export.evaluate.conventions import ConventionResult
from dmtd_export.evaluate.dial import DialResult, DialSetting
from dmtd_export.evaluate.fluency import FluencyResult, Voice
from dmtd_export.evaluate.generation import GenerationResult
from dmtd_export.evaluate.lm_eval_run import HarnessResult
from dmtd_export.evaluate.multiple_choice import ChoiceResult
from dmtd_export.evaluate.offsets import OffsetResult
from dmtd_export.evaluate.run_lengths import RunLengths
from dmtd_export.evaluate.statistics import Bootstrap, Estimate, PairedScores, Retention, retained
from dmtd_export.evaluate.text_metrics import PhaseResult, TextResult
from dmtd_export.evaluate.weight_formats import FormatCost
from dmtd_runtime.bundle.manifest import CycleInfo

SCHEMA_VERSION = 1

TaskResult = ChoiceResult | GenerationResult | HarnessResult


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Everything measured; parts that were not asked for are None."""

    model: Path
    model_kind: str
    adapter: Path | None  # merged into the model
    base: Path | None  # None: the model itself in plain mode
    base_kind: str
    cycle: CycleInfo
    convention_recorded: bool
    text: TextResult | None
    formats: FormatCost | None  # of weights and caches, where model and base differ in nothing else
    runs: Mapping[str, RunLengths]  # by kind of prefix
    tasks: tuple[TaskResult, ...]
    fluency: FluencyResult | None
    dial: DialResult | None
    retention: Retention | None
    conventions: ConventionResult | None
    offsets: OffsetResult | None
    bootstrap: Bootstrap
    context_len: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN and infinity become null. ``ci95`` repeats the intervals under the keys of the values."""
        text, runs, kept = self.text, self.runs, self.retention
        tasks = {scores_of(task).name: task for task in self.tasks}
        made: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "model": {
                "path": str(self.model),
                "kind": self.model_kind,
                "adapter": str(self.adapter) if self.adapter else None,
            },
            "base": {
                "path": str(self.base or self.model),
                "kind": self.base_kind,
                "mode": "plain",
                "is_model": self.base is None,
            },
            "split": {**dataclasses.asdict(self.cycle), "convention_recorded": self.convention_recorded},
            "perplexity": text and _perplexity(text),
            "weight_formats": self.formats and _formats(self.formats),
            "agreement_by_phase": text and {name: r.agreement.value for name, r in _phases(text)},
            "run_lengths": {
                kind: {"mean": r.mean.value, "prefixes": r.prefixes, "counts": list(r.counts), "most": r.most}
                for kind, r in runs.items()
            },
            "retention": kept and _retention(kept),
            "tasks": {name: self._task(task) for name, task in tasks.items()},
            "fluency": self.fluency and _fluency(self.fluency),
            "dial": self.dial and _dial(self.dial),
            "conventions": self.conventions
            and {
                "best": " + ".join(self.conventions.best),
                "as_good": [" + ".join(pair) for pair in self.conventions.as_good],
                "perplexity": {" + ".join(k): r.perplexity.value for k, r in self.conventions.results.items()},
                "agreement": {" + ".join(k): r.agreement.value for k, r in self.conventions.results.items()},
            },
            "offsets": self.offsets and _offsets(self.offsets),
            "ci95": self._intervals(),
            "counts": {
                "tokens": text.overall.tokens if text else 0,
                "windows": text.windows if text else 0,
                "documents": text.documents if text else 0,
                "items": {name: task.items for name, task in tasks.items()},
            },
            "bootstrap": {**dataclasses.asdict(self.bootstrap), "unit": text.unit if text else None},
            "context_len": self.context_len,
            "notes": list(self.notes),
        }
        return _finite(made)  # type: ignore[no-any-return]

    def _intervals(self) -> dict[str, Any]:
        text, kept = self.text, self.retention
        return {
            "perplexity": text and {name: r.perplexity.interval() for name, r in _phases(text)},
            "perplexity_ratio": text and {name: r.ratio.interval() for name, r in _phases(text)},
            "agreement_by_phase": text and {name: r.agreement.interval() for name, r in _phases(text)},
            "run_lengths": {kind: runs.mean.interval() for kind, runs in self.runs.items()},
            "retention": kept and kept.plain and kept.plain.interval(),
            "retention_chance_corrected": kept and kept.chance_corrected and kept.chance_corrected.interval(),
            "fluency": self.fluency
            and {"model": self.fluency.model.nll.interval(), "plain": self.fluency.base.nll.interval()},
            "tasks": {
                scores_of(task).name: {
                    name: estimate.interval()
                    for name, estimate in task_estimates(scores_of(task), self.bootstrap).items()
                }
                for task in self.tasks
            },
        }

    def _task(self, task: TaskResult) -> dict[str, Any]:
        scores = scores_of(task)
        made: dict[str, Any] = {
            "kind": _KINDS[type(task)],
            "items": task.items,
            "chance": float(scores.chance.mean()),
            "plain_above_chance": scores.above_chance,
            **{name: estimate.value for name, estimate in task_estimates(scores, self.bootstrap).items()},
            **dict(zip(("plain_solves", "both_solve"), scores.solved, strict=True)),
        }
        if isinstance(task, ChoiceResult):
            return {
                **made,
                "metric": "acc_norm",
                "acc": float(task.acc.model.mean()),
                "acc_plain": float(task.acc.base.mean()),
                "skipped": task.skipped,
                "phase_share": dict(task.phase_share),
            }
        if isinstance(task, GenerationResult):
            return {**made, "metric": "checked", "same_text": task.same_text}
        return {**made, "metric": task.metric}


_KINDS = {ChoiceResult: "multiple_choice", GenerationResult: "generation", HarnessResult: "lm_eval"}


def scores_of(result: TaskResult) -> PairedScores:
    """The scores of a task that count: acc_norm of multiple choice, the check of generated answers."""
    return result.acc_norm if isinstance(result, ChoiceResult) else result.scores


def task_estimates(scores: PairedScores, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Score, the base's score and their ratio."""
    n = len(scores.model)
    return {
        "score": bootstrap.estimate(scores.table, lambda s: s[..., 0] / n),
        "plain_score": bootstrap.estimate(scores.table, lambda s: s[..., 1] / n),
        "retention": bootstrap.estimate(scores.table, retained),
    }


def _phases(text: TextResult) -> Iterator[tuple[str, PhaseResult]]:
    yield "overall", text.overall
    yield from text.by_phase.items()


def _perplexity(text: TextResult) -> dict[str, Any]:
    return {
        **_sides(text.overall),
        "by_phase": {name: _sides(result) for name, result in text.by_phase.items()},
        "by_source": {name: _sides(result) for name, result in text.by_source.items()},
    }


def _sides(result: PhaseResult) -> dict[str, float]:
    return {
        "model": result.perplexity.value,
        "plain": result.base_perplexity.value,
        "ratio": result.ratio.value,
        "tokens": result.tokens,
    }


def _formats(found: FormatCost) -> dict[str, Any]:
    cycles = {name: _compared(result) for name, result in _phases(found.cycles)}
    return {"plain": _compared(found.plain.overall), "cycles": cycles}


def _compared(result: PhaseResult) -> dict[str, Any]:
    intervals = {"ratio_ci95": result.ratio.interval(), "agreement_ci95": result.agreement.interval()}
    return {**_sides(result), "agreement": result.agreement.value, **intervals}


def _offsets(found: OffsetResult) -> dict[str, Any]:
    return {
        "by_offset": {name: _compared(result) for name, result in found.by_offset.items()},
        "by_phase": {name: _compared(result) for name, result in found.by_phase.items()},
    }


def _fluency(found: FluencyResult) -> dict[str, Any]:
    def of(voice: Voice) -> dict[str, Any]:
        return {"nll": voice.nll.value, "distinct_3grams": voice.distinct_3grams, "texts": list(voice.texts)}

    return {"prompts": list(found.prompts), "model": of(found.model), "plain": of(found.base)}


def _dial(found: DialResult) -> dict[str, Any]:
    def of(setting: DialSetting) -> dict[str, Any]:
        kinds = {name: getattr(setting, name) for name in setting.__slots__}
        made = {name: value.value if isinstance(value, Estimate) else value for name, value in kinds.items()}
        intervals = {name: value.interval() for name, value in kinds.items() if isinstance(value, Estimate)}
        return {**made, "ci95": intervals}

    plain = {"nll": found.base_nll.value, "ci95": {"nll": found.base_nll.interval()}}
    settings = [of(setting) for setting in found.settings]
    return {
        "conditions": dict(found.conditions),
        "prompts": found.prompts,
        "batch": found.batch,
        "settings": settings,
        "plain": plain,
    }


def _retention(kept: Retention) -> dict[str, Any]:
    return {
        "value": kept.plain and kept.plain.value,
        "chance_corrected": kept.chance_corrected and kept.chance_corrected.value,
        "tasks": list(kept.tasks),
        "left_out": list(kept.left_out),
        "wide": kept.wide,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
