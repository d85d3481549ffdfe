"""The onnxruntime module, of which two distributions own the same folder: imported here alone."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from dmtd_runtime.errors import BackendError

INSTALL_HINT = 'install one of: pip install "dmtd[cpu]"   or, on a machine with an NVIDIA GPU: pip install "dmtd[gpu]"'


def import_onnxruntime() -> Any:
    """The onnxruntime module; BackendError with the pip line where it is missing or installed twice."""
    present = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(present) == 2:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; run: "
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "dmtd[gpu]"   (or "dmtd[cpu]")'
        )
    # From 1.32 on ONNX Runtime collects facts about the machine unless this stands before its first import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C within the import, which its C++ side dresses up
            raise KeyboardInterrupt from None
        raise BackendError(f"ONNX Runtime cannot be imported ({error}); {INSTALL_HINT}") from None
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
