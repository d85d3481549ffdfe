"""What a measurement ran on, as far as the machine tells: GPU, libraries, commit. Kept with every report of the benchmark."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.onnxruntime.limits import runs_own_products
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.device.libraries import gpu_here
from dmtd_runtime.errors import BackendError
from dmtd_runtime.machine.hardware import default_threads, look_at_gpus, look_at_machine
from dmtd_runtime.ort.kernels.library import instruction_set
from dmtd_runtime.version import __version__


def load_average() -> float | None:
    """Of the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def conditions_of(directory: Path, manifest: Manifest, backend: BackendOptions, load: float | None) -> dict[str, Any]:
    """Bundle, backend, machine and versions, ready for JSON. ``load``: the load average before measuring."""
    machine, cycle = look_at_machine(), manifest.cycle
    engines = backend.runs_engines
    on_gpu = backend.device == "cuda" or (engines and backend.backend != "simulator")
    return {
        "bundle": str(directory),
        "family": manifest.model.family,
        "split": [cycle.encoding_layers, cycle.thinking_layers, cycle.decoding_layers],
        "cycle_length": cycle.cycle_length,
        "cycle_origin": cycle.cycle_origin,
        "prompt_input": cycle.prompt_input,
        "dtype": manifest.model.dtype,
        "kv_dtype": manifest.model.cache_dtype,
        "backend": backend.backend,
        "device": backend.device,
        "dialect": "standard" if engines else backend.dialect or manifest.default_dialect,
        "full_pass": backend.full_pass,
        "max_model_len": backend.max_model_len or manifest.model.max_model_len,
        "cpu": machine.cpu,
        "isa": list(machine.isa),
        "products": instruction_set() if not engines and runs_own_products(manifest, backend) else None,
        "cores": machine.cores_usable,
        "threads": backend.threads or default_threads(),
        "load_average": load,
        "platform": machine.platform,
        "python": machine.python,
        "onnxruntime": version_of("onnxruntime", "onnxruntime-gpu"),
        "tensorrt": tensorrt_of(backend) if engines else None,
        "gpu": gpu_name(backend.device_id) if on_gpu else None,
        "driver": look_at_gpus()[1] if on_gpu else None,
        "dmtd": __version__,
        "commit": commit(),
    }


def gpu_name(device_id: int) -> str | None:
    """The GPU's name; None where there is none."""
    with contextlib.suppress(BackendError):
        return gpu_here(device_id).name
    return None


def tensorrt_of(backend: BackendOptions) -> str | None:
    """The library that runs engines; the simulator's is ONNX Runtime."""
    names = {"tensorrt": ("tensorrt-cu13", "tensorrt"), "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx")}
    return version_of(*names.get(backend.backend, ()))


def version_of(*distributions: str) -> str | None:
    """Name and version of the first distribution that is installed."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return None


def commit() -> str | None:
    """The commit of the sources that run, "+" if they were changed; None where they are no checkout of git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False)

    try:
        # An installed copy may lie inside a checkout of something else: only tracked sources have a commit.
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return None
        head = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
    except OSError:
        return None
