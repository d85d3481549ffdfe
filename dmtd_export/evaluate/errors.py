"""The error of evaluation, beside those of checkpoints and bundles."""

from dmtd_runtime.errors import DmtdError


class EvaluateError(DmtdError):
    """The evaluation cannot be done as asked."""
