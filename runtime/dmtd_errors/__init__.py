"""The base of every error that dmtd raises on purpose, whichever of its packages does: none of them imports another for it.

    DmtdError                       one line for the user: what, got, expected, how to fix it
    ├── BundleError                 a file of the bundle is missing, altered, too new or not a bundle
    ├── RequestError (ValueError)   a prompt or an option that cannot be served
    ├── BackendError                the library, device or provider asked for is not usable
    ├── AbortedError                the request was cancelled, timed out, or its worker was closed
    ├── QueueFullError              as many requests wait as may; try again later
    ├── MissingExtraError           a verb needs a library of an optional extra
    ├── ExportError                 an export or a build cannot be done as asked; nothing was written
    ├── VerificationError           a bundle or engines compute something else than the model
    ├── EvaluateError               an evaluation cannot be done as asked
    └── ModelError (ValueError)     of dmtd_models
        ├── ConfigError             config.json or the options: unsupported or contradictory
        ├── CheckpointError         files missing, truncated, or of an unknown form
        ├── DataError               training data or an evaluation item that cannot be used
        ├── AnswersError            the base's answers, written for a fine-tuning, are not those of the run
        └── DivergedError           the loss of a fine-tuning is no number any more

The command line prints the message and exits 1, or 2 where it names an option; anything that is not a ``DmtdError`` is a bug
and keeps its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["DmtdError", "at_fault"]


class DmtdError(Exception):
    """Base of all errors with a message meant for the user.

    Args:
        problem: what was got, what was expected, how to fix it.
        param: the argument, option or field that is at fault, as the caller of Python wrote it (``max_num_seqs``,
            ``messages[0].role``); the message begins with it. None where it is none of them.
    """

    def __init__(self, problem: str = "", *, param: str | None = None) -> None:
        super().__init__(problem if param is None else f"{param}: {problem}")
        self.problem = problem
        self.param = param


@contextlib.contextmanager
def at_fault(param: str) -> Iterator[None]:
    """Errors inside that name nothing name ``param``: what was opened there is what it said."""
    try:
        yield
    except DmtdError as error:
        if error.param is None:
            error.param, error.args = param, (f"{param}: {error.problem}",)
        raise
