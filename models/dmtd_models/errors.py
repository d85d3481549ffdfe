"""Errors of the model package: one line that says what was found, what was expected and how to fix it.

ModelError (ValueError)
├── ConfigError        config.json or the DMTD options: unsupported or contradictory
└── CheckpointError    files missing, truncated, or of an unknown form

The messages name the file or the field.
"""


class ModelError(ValueError):
    """Base of the package's errors."""


class ConfigError(ModelError):
    """A configuration that cannot be honoured exactly."""


class CheckpointError(ModelError):
    """A checkpoint that cannot be read."""
