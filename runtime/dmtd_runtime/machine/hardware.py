"""The machine a process finds itself on: CPU, cores it may use, memory, NVIDIA GPUs. Read, never changed.

From files under /proc and /sys, which containers limit, and from nvidia-smi where there is one. Used by ``doctor.py``
and by whoever states the conditions of a measurement. Knows nothing of Python packages.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Gpu",
    "Machine",
    "default_threads",
    "huge_pages_setting",
    "look_at_gpus",
    "look_at_machine",
    "memory_bytes",
    "threads_of",
    "usable_cores",
]

# Instruction sets that matrix kernels are written for, x86-64 and Arm, as /proc/cpuinfo spells them.
ISA_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
MAX_THREADS = max(64, os.cpu_count() or 1)
"""Of a computation: 64, or as many as the machine has cores; more only slow it down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The host. ``cores_usable`` respects affinity and cgroup quota, so it may be a fraction.

    Memory is capped by the cgroup's limit; what the group has already used of it is not subtracted. ``huge_pages``: ``always``,
    ``madvise`` or ``never``; None where there are none.
    """

    python: str
    platform: str
    cpu: str
    isa: tuple[str, ...]
    cores_present: int
    cores_usable: float
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    huge_pages: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU; what the driver does not tell is None."""

    name: str
    memory_mib: int | None
    compute_capability: str | None


def look_at_machine(root: Path = Path("/")) -> Machine:
    """CPU, cores and memory of this machine; ``root`` is where /proc and /sys are found."""
    cpuinfo = _read(root / "proc/cpuinfo")
    fields = dict(re.findall(r"^([^\t:\n]+?)\s*: (.*)$", cpuinfo, flags=re.MULTILINE))
    flags = set(str(fields.get("flags", fields.get("Features", ""))).split())
    total, available = memory_bytes(root)
    return Machine(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        cores_present=os.cpu_count() or 1,
        cores_usable=usable_cores(root),
        memory_total_bytes=total,
        memory_available_bytes=available,
        huge_pages=huge_pages_setting(root),
    )


def huge_pages_setting(root: Path = Path("/")) -> str | None:
    """``always``, ``madvise`` or ``never``; None where there are no huge pages to be had."""
    found = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else None


def look_at_gpus(root: Path = Path("/")) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and driver version as nvidia-smi tells them, else as the driver's files do."""
    rows = _nvidia_smi() if root == Path("/") else []
    if rows:
        gpus = tuple(
            Gpu(name=name, memory_mib=int(memory) if memory.isdigit() else None, compute_capability=capability)
            for name, _, memory, capability in rows
        )
        return gpus, rows[0][1]
    driver = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _read(root / "proc/driver/nvidia/version"))
    names = [
        re.search(r"^Model:\s*(.+?)\s*$", _read(path), flags=re.MULTILINE)
        for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    ]
    gpus = tuple(Gpu(name=name.group(1), memory_mib=None, compute_capability=None) for name in names if name)
    return gpus, driver.group(1) if driver else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cgroup_files(root: Path, v2_name: str, v1_controller: str, v1_name: str) -> list[str]:
    """The texts of a limit's files from the process's cgroup up to the root, version 2 first; those that exist."""
    texts = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and v1_controller not in controllers.split(","):
            continue
        base, name = (
            (root / "sys/fs/cgroup" / v1_controller, v1_name) if controllers else (root / "sys/fs/cgroup", v2_name)
        )
        folder = base / group.lstrip("/")
        # Inside a container the group's path may not exist under the mount: the mount's own files count as well.
        texts += [_read(place / name) for place in (folder, *folder.parents) if place.is_relative_to(base)]
    return [text for text in texts if text]


def usable_cores(root: Path = Path("/")) -> float:
    """Cores that this process may use: affinity and cgroup quota, so possibly a fraction."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    for text in _cgroup_files(root, "cpu.max", "cpu", "cpu.cfs_quota_us"):
        quota, *period = text.split()
        if quota.isdigit() and int(quota) > 0:
            # Version 1 keeps the period in a file of its own, which is 100 ms unless someone changed it.
            cores = min(cores, int(quota) / int(period[0] if period else 100_000))
    return round(cores, 2)


def default_threads() -> int:
    """Threads of a computation: one for each core that this process may use."""
    return threads_of(usable_cores())


def threads_of(cores: float) -> int:
    """As many as there are cores, of which a quota may leave a fraction."""
    return max(1, round(cores))


def memory_bytes(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Total and available memory, each capped by the smallest cgroup limit."""
    fields = {
        name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.M)
    }
    limits = [
        int(text)
        for text in _cgroup_files(root, "memory.max", "memory", "memory.limit_in_bytes")
        if text.strip().isdigit()
    ]
    values = (fields.get("MemTotal"), fields.get("MemAvailable"))
    total, available = (None if value is None else min([value, *limits]) for value in values)
    return total, available


def _nvidia_smi() -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = (
        [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
        if done.returncode == 0
        else []
    )
    return [row for row in rows if len(row) == 4]
