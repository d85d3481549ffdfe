"""Errors of text and data: one line that says what was found, what was expected and how to fix it.

ModelError (ValueError)
└── DataError          training data or an evaluation item that cannot be used
    └── PackageError   a package that cannot be downloaded, or holds other bytes than expected
"""

from dmtd_models.errors import ModelError


class DataError(ModelError):
    """Data that cannot be used as it is."""


class PackageError(DataError):
    """A package that cannot be had, or is not the one this code was written for."""
