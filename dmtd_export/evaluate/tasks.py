"""Where a local task's items come from: a file of one's own, read by ``dmtd_models.data.task_file``, whose text has the forms.

Tasks with names are those of the lm-eval harness (``lm_eval_run``).
"""

from __future__ import annotations

from pathlib import Path

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_models.data.task_file import Items, read_items
from dmtd_models.errors import ModelError


def read_task(name: str, limit: int | None) -> Items:
    """The first ``limit`` items of a file.

    Raises:
        EvaluateError: no such file, a record that is no item, or none at all.
    """
    path = Path(name)
    if not path.exists():
        raise EvaluateError(
            f"{name}: no such file; a task is a file of items of your own (.jsonl), names are those of the lm-eval "
            f"harness: --lm-eval {name}",
            param="tasks",
        )
    try:
        items = read_items(path)[:limit]
    except ModelError as error:
        raise EvaluateError(f"{error}", param="tasks") from error
    if not items:
        raise EvaluateError(f"{name}: no items; give a task that has some, or a larger --limit", param="tasks")
    return items
