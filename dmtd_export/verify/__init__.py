"""`dmtd verify`: a bundle against itself and against the PyTorch reference. See ``run`` for the levels."""

from dmtd_export.verify.built import FAILED, SKIPPED, engines_hook
from dmtd_export.verify.on_device import largest_batch, verify_on_device
from dmtd_export.verify.report import Check, Divergence, Level, VerificationError, VerifyReport, record, render
from dmtd_export.verify.run import VerifyOptions, verify_bundle, verify_hook

__all__ = [
    "FAILED",
    "SKIPPED",
    "Check",
    "Divergence",
    "Level",
    "VerificationError",
    "VerifyOptions",
    "VerifyReport",
    "engines_hook",
    "largest_batch",
    "record",
    "render",
    "verify_bundle",
    "verify_hook",
    "verify_on_device",
]
