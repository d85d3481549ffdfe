"""The end of a build on the machine that will run it: every kernel is compiled once, and kept for whoever opens the engines.

TensorRT-RTX engines hold no kernels for a GPU; the runtime compiles them at the first run of each shape and keeps them under the
user's cache directory. So new engines are opened, warmed up and closed, as a runtime does it with the option ``warm_up``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.opening import open_backend
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import EngineRecord
from dmtd_runtime.bundle.opening import open_bundle
from dmtd_runtime.device.libraries import gpu_here
from dmtd_runtime.errors import BackendError, DmtdError


def compiles_here(record: EngineRecord) -> bool:
    """Whether the engines are of a library that compiles when they run, and this machine's GPU may run them."""
    if record.backend != "tensorrt-rtx":
        return False
    try:
        return record.runs_on(gpu_here().compute_capability)
    except BackendError:
        return False


def warm_up_engines(bundle: Path, directory: Path, record: EngineRecord) -> str:
    """Run everything that a runtime can meet with these engines once, at their largest batch; why not, in one line, or ""."""
    manifest = open_bundle(bundle)
    options = BackendOptions(backend=record.backend, max_num_seqs=record.max_num_seqs, full_pass="staged", warm_up=True)
    fused = any(engine.graph == contract.FULL_PASS for engine in record.engines)
    try:
        for each in (options, *([replace(options, full_pass="fused")] if fused else [])):
            open_backend(bundle, manifest, each, engines=directory).close()
    except DmtdError as error:
        return str(error)
    return ""
