"""`--lm-eval`: tasks of the lm-eval harness with model and base, item by item, so that retention and intervals cover them.

The harness is imported when it is run.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.options import HarnessOptions, OpenOptions
from dmtd_export.evaluate.statistics import PairedScores
from dmtd_export.evaluate.subject import Subject

# The metric of an item that counts, the first that a task has.
METRICS = ("acc_norm", "exact_match", "pass@1", "pass_at_1", "acc", "f1", "em")


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessResult:
    """One task of the harness; ``metric`` is the one that counts."""

    scores: PairedScores
    metric: str

    @property
    def items(self) -> int:
        """How many."""
        return len(self.scores.model)


def run_harness(
    model: tuple[Subject, OpenOptions],
    base: tuple[Subject, OpenOptions],
    options: HarnessOptions,
    *,
    limit: int | None,
    seed: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> tuple[list[HarnessResult], list[str]]:
    """Run the tasks with the model under its pattern and the base in plain mode.

    Returns:
        A result a task (groups give one for each of their tasks), and the names of tasks that score no single items.

    Raises:
        EvaluateError: a task that the harness does not know, or cannot run.
    """
    sides = []
    manager = _task_manager(options)
    for (subject, opening), plain in ((model, False), (base, True)):
        sides.append(_evaluate(subject, opening, plain, options, manager, limit, seed))
        on_done(1)
    results, unscored = [], []
    for task, samples in sides[0]["samples"].items():
        paired = _pair(task, samples, sides[1]["samples"][task], sides[0]["configs"][task])
        if paired is None:
            unscored.append(task)
        else:
            results.append(paired)
    return results, unscored


def _task_manager(options: HarnessOptions) -> Any:
    """The harness's index of tasks. Its own tasks are thousands of files: they are read only if one of them is asked for."""
    from lm_eval.tasks import TaskManager

    if options.lm_eval_include is not None:
        if not options.lm_eval_include.is_dir():
            raise EvaluateError(f"{options.lm_eval_include} is no directory", param="lm_eval_include")
        own = TaskManager(include_path=str(options.lm_eval_include), include_defaults=False)
        if set(options.lm_eval) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if options.lm_eval_include is None else str(options.lm_eval_include))


def _evaluate(
    subject: Subject,
    opening: OpenOptions,
    plain: bool,
    options: HarnessOptions,
    manager: Any,
    limit: int | None,
    seed: int,
) -> Mapping[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    from dmtd_export.evaluate.lm_eval_adapter import DmtdLM

    adapter = DmtdLM.over(subject, opening, plain=plain)
    try:
        # The harness prints to stdout, which is the report's.
        with contextlib.redirect_stdout(io.StringIO()):
            found = simple_evaluate(
                model=adapter,
                tasks=list(options.lm_eval),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=options.lm_eval_chat,
                confirm_run_unsafe_code=options.run_unsafe_code,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (ValueError, KeyError, OSError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EvaluateError(f"{','.join(options.lm_eval)}: {lines[0]}", param="lm_eval") from error
    finally:
        adapter.close()
    assert found is not None, "one process has all results"
    return dict(found)


def _pair(
    task: str, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> HarnessResult | None:
    """Scores of the same documents under the first filter; None if no metric gives an item a number."""
    first = ours[0]["filter"]
    model = {s["doc_id"]: s for s in ours if s["filter"] == first}
    base = {s["doc_id"]: s for s in theirs if s["filter"] == first}
    sample = next(iter(model.values()))
    metric = next((m for m in METRICS if isinstance(sample.get(m), int | float | np.number | np.bool_)), None)
    if metric is None:
        return None
    ids = sorted(model)
    return HarnessResult(
        scores=PairedScores(
            name=task,
            model=np.array([float(model[i][metric]) for i in ids]),
            base=np.array([float(base[i][metric]) for i in ids]),
            chance=np.array([_chance(model[i], config) for i in ids]),
        ),
        metric=metric,
    )


def _chance(sample: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    if config.get("output_type") != "multiple_choice":
        return 0.0
    # For mutual information the harness asks for every choice twice.
    asked = len(sample["arguments"]) / (2 if "acc_mutual_info" in sample["metrics"] else 1)
    return 1 / asked
