"""`dmtd verify`: a bundle against itself and against the PyTorch reference. See ``run`` for the levels."""

from dmtd_export.verify.report import Check, Divergence, Level, VerificationError, VerifyReport, record, render
from dmtd_export.verify.run import VerifyOptions, verify_bundle, verify_hook

__all__ = [
    "Check",
    "Divergence",
    "Level",
    "VerificationError",
    "VerifyOptions",
    "VerifyReport",
    "record",
    "render",
    "verify_bundle",
    "verify_hook",
]
