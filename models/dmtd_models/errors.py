"""Errors of the model package. The whole tree, and the base, stand in ``dmtd_errors``."""

from dmtd_errors import DmtdError


class ModelError(DmtdError, ValueError):
    """Base of the package's errors."""


class ConfigError(ModelError):
    """A configuration that cannot be honoured exactly."""


class CheckpointError(ModelError):
    """A checkpoint that cannot be read."""
