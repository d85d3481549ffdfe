"""The verification at the end of `dmtd build`: new engines, on this machine's device, before they take their place.

Engines that compute something else raise and are not placed. What cannot be verified here (no GPU, one that they are not for,
no PyTorch, a device that fails) is no reason to throw a build away: the record says why, in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmtd_export.verify.levels import LARGE_BYTES, float32_bytes, installed
from dmtd_export.verify.on_device import LARGEST_BATCH, verify_on_device
from dmtd_export.verify.report import VerificationError, VerifyReport, record
from dmtd_models.progress import Progress, silent
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import ANY_GPU, OLDEST_CAPABILITY, EngineRecord, FullPass
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.device.libraries import gpu_here
from dmtd_runtime.errors import BackendError, DmtdError

SKIPPED, FAILED = (
    "skipped",
    "failed",
)  # keys of a reason in the record's verification: not tried, and did not run to its end

Hook = Callable[[Path, Path, EngineRecord], dict[str, Any]]


def engines_hook(
    *,
    progress: Progress = silent,
    on_report: Callable[[VerifyReport], None] | None = None,
) -> Hook:
    """The hook for ``build_engines``: (bundle, directory of the engines, their record) -> what the record keeps of it.

    Staged and, where it was built, fused full passes are run. The hook raises VerificationError, which names the first
    divergence, where the engines compute something else.
    """

    def hook(bundle: Path, engines: Path, built: EngineRecord) -> dict[str, Any]:
        if reason := why_not_here(built):
            return {SKIPPED: reason}
        batch, quick = min(LARGEST_BATCH, built.max_num_seqs), float32_bytes(load_manifest(bundle)) > LARGE_BYTES
        ways: list[FullPass] = ["staged"]
        if any(engine.graph == contract.FULL_PASS for engine in built.engines):
            ways.append("fused")
        reports = []
        try:
            for way in ways:
                options = BackendOptions(backend=built.backend, full_pass=way, max_num_seqs=batch)
                reports.append(verify_on_device(bundle, options, quick=quick, engines=engines, progress=progress))
        except DmtdError as error:
            return {FAILED: str(error)}
        seconds, checks = sum(one.seconds for one in reports), tuple(check for one in reports for check in one.checks)
        report = replace(reports[0], checks=checks, seconds=seconds)
        if on_report is not None:
            on_report(report)
        if not report.ok:
            raise VerificationError(
                f"the engines compute something else than the model: {report.first_divergence}; nothing was kept; "
                f"to keep them and look into it, build with --no-verify, then run dmtd verify --backend {built.backend}"
            )
        return record(report)

    return hook


def why_not_here(built: EngineRecord) -> str:
    """Why engines cannot be verified on this machine; empty where they can."""
    if not installed("torch"):
        return 'PyTorch, the reference, is not installed; run: pip install "dmtd[oracle]"'
    if built.backend == "simulator":
        return "ONNX Runtime has no bfloat16 kernels for the CPU" if built.dtype == "bfloat16" else ""
    try:
        gpu = gpu_here()
    except BackendError as error:
        return str(error).partition(";")[0]  # what to do about it would be for somebody who wants to run them here
    if not built.runs_on(gpu.compute_capability):
        wanted = built.compute_capability
        for_gpu = f"{OLDEST_CAPABILITY} and later" if wanted == ANY_GPU else wanted
        return (
            f"the engines are for compute capability {for_gpu}, this machine's {gpu.name} has {gpu.compute_capability}"
        )
    return ""
