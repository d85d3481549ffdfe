"""The error of exports and builds. The whole tree stands in ``dmtd_errors``."""

from dmtd_runtime.errors import DmtdError


class ExportError(DmtdError):
    """The export or build cannot be done as asked; nothing was written."""
