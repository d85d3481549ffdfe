"""Errors of the exporter, beside those of ``dmtd_models`` (checkpoints) and ``dmtd_runtime`` (bundles)."""

from dmtd_runtime.errors import DmtdError


class ExportError(DmtdError):
    """The export cannot be done as asked; nothing was written."""
