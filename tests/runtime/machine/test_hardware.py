"""What is seen of made-up machines: fake /proc and /sys, a fake nvidia-smi."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_files import gpu_files, write

from dmtd_runtime.machine import hardware as machine


def test_cpu_and_memory_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma amx_bf16 avx512_vnni\n",
            "proc/meminfo": "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    8000000 kB\n",
        },
    )
    host = machine.look_at_machine(tmp_path)
    assert host.cpu == "Some CPU"
    assert host.isa == ("avx2", "fma", "avx512_vnni", "amx_bf16")
    assert (host.memory_total_bytes, host.memory_available_bytes) == (16_384_000_000, 8_192_000_000)


def test_arm_features(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd i8mm sve\n"})
    assert machine.look_at_machine(tmp_path).isa == ("asimd", "i8mm", "sve")


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, 8.0, 1_048_576_000),
        # version 2: own group tighter than its parent
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n",
          "sys/fs/cgroup/a/cpu.max": "max 100000\n", "sys/fs/cgroup/a/memory.max": "500000000\n"}, 1.5, 500_000_000),
        # version 2 in a container: the group's path does not exist under the mount, the mount's files do
        ({"proc/self/cgroup": "0::/host/path\n", "sys/fs/cgroup/cpu.max": "200000 100000\n",
          "sys/fs/cgroup/memory.max": "max\n"}, 2.0, 1_048_576_000),
        # version 1
        ({"proc/self/cgroup": "4:memory:/m\n2:cpu,cpuacct:/c\n", "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "300000\n",
          "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/memory/m/memory.limit_in_bytes": "9223372036854771712\n"}, 3.0, 1_048_576_000),
    ],
)  # fmt: skip
def test_cgroup_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: float, memory: int
) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    write(tmp_path, {"proc/meminfo": "MemTotal: 1024000 kB\nMemAvailable: 1024000 kB\n", **files})
    host = machine.look_at_machine(tmp_path)
    assert host.cores_usable == cores
    assert host.memory_total_bytes == memory


def test_gpu_from_the_drivers_files(tmp_path: Path) -> None:
    assert machine.look_at_gpus(tmp_path) == ((), None)
    (gpu,), driver = machine.look_at_gpus(write(tmp_path, gpu_files()))
    assert (gpu.name, gpu.memory_mib, driver) == ("NVIDIA L40S", None, "580.65.06")


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = write(folder, {"nvidia-smi": f"#!/bin/sh\n{script}\n"}) / "nvidia-smi"
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_gpu_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "NVIDIA H200, 580.65.06, 143771, 9.0\\nNVIDIA GB10, 580.65.06, [N/A], 12.1"
    fake_nvidia_smi(tmp_path, monkeypatch, f"printf '{lines}\\n'")
    gpus, driver = machine.look_at_gpus()
    assert [(gpu.name, gpu.memory_mib, gpu.compute_capability) for gpu in gpus] == [
        ("NVIDIA H200", 143771, "9.0"),
        ("NVIDIA GB10", None, "12.1"),
    ]
    assert driver == "580.65.06"


def test_failing_nvidia_smi_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed, a, b, c'; exit 9")
    assert machine._nvidia_smi() == []
