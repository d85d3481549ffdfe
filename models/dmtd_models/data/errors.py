"""Errors of text and data: one line that says what was found, what was expected and how to fix it.

ModelError (ValueError)
└── DataError   training data or an evaluation item that cannot be used
"""

from dmtd_models.errors import ModelError


class DataError(ModelError):
    """Data that cannot be used as it is."""
