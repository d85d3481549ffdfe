"""The error of evaluation, a branch of the tree in ``dmtd_errors``."""

from dmtd_runtime.errors import DmtdError


class EvaluateError(DmtdError):
    """The evaluation cannot be done as asked."""
