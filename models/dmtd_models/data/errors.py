"""Errors of text and data, branches of the tree in ``dmtd_errors``."""

from dmtd_models.errors import ModelError


class DataError(ModelError):
    """Data that cannot be used as it is."""
