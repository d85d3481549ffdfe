"""The doctor against made-up machines: fake /proc and /sys, fake package metadata."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine_files import gpu_files, write
from rich.console import Console

from dmtd_runtime.cli import doctor_facts as doctor
from dmtd_runtime.cli.doctor_facts import Report, collect, render, to_json
from dmtd_runtime.device.libraries import CUDA_MAJOR, LIBRARIES
from dmtd_runtime.errors import BackendError
from dmtd_runtime.ort.cuda_provider import CudaNeeds, Library

HEALTHY = {"onnxruntime": "1.31.1", "numpy": "2.4.6", "tokenizers": "0.23.3", "onnx": "1.23.2", "torch": "2.13.0+cpu"}


class FakeOnnxRuntime(SimpleNamespace):
    """Stands for the imported package."""

    def get_available_providers(self) -> list[str]:
        return list(self.providers)


@pytest.fixture
def onnxruntime_is(monkeypatch: pytest.MonkeyPatch):
    def put(version: str | None, *providers: str) -> None:
        module = None if version is None else FakeOnnxRuntime(__version__=version, providers=providers)
        monkeypatch.setitem(sys.modules, "onnxruntime", module)  # None makes the import fail

    put("1.31.1", "CPUExecutionProvider")
    return put


CUDA_NAMES = ("libcublas.so.13", "libcudart.so.13", "libcudnn.so.9")


def needs(*missing: str, driver_cuda: str | None = "13.0", driver_error: str | None = None) -> CudaNeeds:
    libraries = tuple(Library(name=name, error="gone" if name in missing else None) for name in CUDA_NAMES)
    return CudaNeeds(cuda_major=13, libraries=libraries, driver_error=driver_error, driver_cuda=driver_cuda)


def report_of(
    root: Path,
    versions: Mapping[str, str],
    environ: Mapping[str, str] | None = None,
    cuda: CudaNeeds | None = None,
) -> Report:
    return collect(
        root=root, environ=environ or {}, version_of=dict(versions).get, look_at_cuda=lambda ort: cuda or needs()
    )


def test_healthy_machine_has_no_problem(tmp_path: Path, onnxruntime_is) -> None:
    report = report_of(tmp_path, HEALTHY)
    assert report.problems == ()
    assert report.onnxruntime.providers == ("CPUExecutionProvider",)
    assert {part.name: part.version for part in report.components if part.version} == {
        name: version for name, version in HEALTHY.items() if name != "onnxruntime"
    }


@pytest.mark.parametrize(
    ("instructions", "value", "words"),
    [
        ("avx512", "", "dmtd's own products, avx512"),
        (None, "off", "ONNX Runtime's products: DMTD_KERNELS=off"),
        (None, "", "ONNX Runtime's products, slower: dmtd's were not built on installation"),
    ],
)
def test_it_tells_whose_products_run(
    tmp_path: Path, onnxruntime_is, monkeypatch: pytest.MonkeyPatch, instructions: str | None, value: str, words: str
) -> None:
    monkeypatch.setattr(doctor, "instruction_set", lambda: instructions)
    monkeypatch.setattr(doctor, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setenv("DMTD_KERNELS", value)
    report = report_of(tmp_path, HEALTHY)
    assert report.products == instructions
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(report))
    assert words in console.export_text()


def test_products_that_cannot_run_are_a_problem(
    tmp_path: Path, onnxruntime_is, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str | None:
        raise BackendError("DMTD_KERNELS: got 'x', expected one of off, avx2, avx512")

    monkeypatch.setattr(doctor, "instruction_set", refuse)
    report = report_of(tmp_path, HEALTHY)
    assert report.products is None
    assert report.problems == ("DMTD_KERNELS: got 'x', expected one of off, avx2, avx512",)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(report))
    assert "none: see the problem below" in console.export_text()


def test_both_onnxruntime_wheels_is_one_problem_with_its_fix(tmp_path: Path, onnxruntime_is) -> None:
    (line,) = report_of(tmp_path, {**HEALTHY, "onnxruntime-gpu": "1.31.1"}).problems
    assert line.endswith('run: pip uninstall -y onnxruntime onnxruntime-gpu && pip install "dmtd[cpu]"')
    (line,) = report_of(write(tmp_path, gpu_files()), {**HEALTHY, "onnxruntime-gpu": "1.31.1"}).problems
    assert line.endswith('&& pip install "dmtd[gpu]"')


def test_no_onnxruntime_wheel_names_both_extras(tmp_path: Path, onnxruntime_is) -> None:
    onnxruntime_is(None)
    (line,) = report_of(tmp_path, {"numpy": "2.4.6", "tokenizers": "0.23.3"}).problems
    assert 'pip install "dmtd[cpu]"' in line
    assert 'pip install "dmtd[gpu]"' in line


def test_onnxruntime_from_another_distribution_is_fine(tmp_path: Path, onnxruntime_is) -> None:
    assert report_of(tmp_path, {"numpy": "2.4.6", "tokenizers": "0.23.3"}).problems == ()


def test_broken_onnxruntime_is_reported(tmp_path: Path, onnxruntime_is) -> None:
    onnxruntime_is(None)
    report = report_of(tmp_path, HEALTHY)
    (line,) = report.problems
    assert "fails to import (ModuleNotFoundError" in line
    assert line.endswith('pip uninstall -y onnxruntime && pip install "dmtd[cpu]"')
    assert report.onnxruntime.providers == ()


def test_gpu_wheel_that_lost_its_provider(tmp_path: Path, onnxruntime_is) -> None:
    versions = {"onnxruntime-gpu": "1.31.1", "numpy": "2.4.6", "tokenizers": "0.23.3", "cuda-bindings": "13.5.0"}
    assert report_of(tmp_path, versions).problems == ()  # without a GPU the wheel runs on the CPU
    (line,) = report_of(write(tmp_path, gpu_files()), versions).problems
    assert "CUDAExecutionProvider" in line
    onnxruntime_is("1.31.1", "CUDAExecutionProvider", "CPUExecutionProvider")
    assert report_of(tmp_path, versions).problems == ()


@pytest.mark.parametrize(
    ("name", "version", "too_old"),
    [
        ("onnx", "1.22.9", True),
        ("onnx", "1.23", False),
        ("onnx", "1.23.0rc1", False),
        ("torch", "2.13.0+cu130", False),
        ("torch", "1.13.1", True),
        ("polygraphy", "0.53.5", True),
        ("tokenizers", "0.9.9", True),
        ("numpy", "10.0", False),
    ],
)
def test_versions_compare_as_numbers(tmp_path: Path, onnxruntime_is, name: str, version: str, too_old: bool) -> None:
    problems = report_of(tmp_path, {**HEALTHY, name: version}).problems
    assert [line.startswith(f"{name}: got {version}, expected ") for line in problems] == ([True] if too_old else [])


def test_old_onnxruntime(tmp_path: Path, onnxruntime_is) -> None:
    onnxruntime_is("1.9.0", "CPUExecutionProvider")
    (line,) = report_of(tmp_path, HEALTHY).problems
    assert line.startswith("onnxruntime: got 1.9.0, expected 1.31 or newer")


def test_missing_base_dependency(tmp_path: Path, onnxruntime_is) -> None:
    (line,) = report_of(tmp_path, {"onnxruntime": "1.31.1", "numpy": "2.4.6"}).problems
    assert line.startswith("tokenizers: not installed")
    assert line.endswith("pip install tokenizers")


def test_tensorrt_is_found_under_its_cuda_names(tmp_path: Path, onnxruntime_is) -> None:
    report = report_of(tmp_path, {**HEALTHY, "tensorrt-rtx-cu13": "1.7.1.116"})
    versions = {part.name: part.version for part in report.components}
    assert versions["tensorrt-rtx"] == "1.7.1.116"
    assert versions["tensorrt"] is None


def test_install_lines_and_limits_agree_with_pyproject(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def closure(requirements: list[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for requirement in requirements:
            inner = re.fullmatch(r"dmtd\[(.+)\]", requirement)
            if inner:
                found.update(closure([line for extra in inner.group(1).split(",") for line in extras[extra]]))
            else:
                name, _, limits = requirement.partition(">=")
                name = name.partition("[")[0]  # an extra of its own
                found[name] = limits.split(",")[0]
        return found

    checked = 0
    for name, _, oldest, argument in doctor.COMPONENTS:
        if argument == "dmtd" or argument.startswith("dmtd["):
            inner = re.fullmatch(r"dmtd\[([\w-]+)\]", argument)
            brought = closure(extras[inner.group(1)] if inner else project["dependencies"])
            [bound] = [brought[alias] for alias in doctor.ALIASES.get(name, (name,)) if alias in brought]
            if name in LIBRARIES:  # of these the doctor checks the major version
                bound, oldest = bound.partition(".")[0], str(LIBRARIES[name].major)
            assert bound == oldest, f"{name}: pyproject.toml has {bound}, the doctor {oldest}"
            checked += 1
    assert checked >= 21
    known = {alias for name, *_ in doctor.COMPONENTS for alias in doctor.ALIASES.get(name, (name,))}
    verbs = set(extras) - {"cpu", "gpu", "test", "dev"}
    assert {name for extra in verbs for name in closure(extras[extra])} - known == {"onnxruntime"}  # of the demo
    assert closure(extras["cpu"]) == {"onnxruntime": doctor.ONNXRUNTIME_OLDEST}
    assert closure(extras["gpu"]) == {
        "onnxruntime-gpu": doctor.ONNXRUNTIME_OLDEST,
        **{name: str(CUDA_MAJOR) for name in ("nvidia-cublas", "cuda-bindings")},
    }


def test_thread_environment_keeps_what_matters(tmp_path: Path, onnxruntime_is) -> None:
    report = report_of(tmp_path, HEALTHY, {"OMP_NUM_THREADS": "1", "HOME": "/root"})
    assert report.thread_environment == {"OMP_NUM_THREADS": "1"}
    host = dataclasses.replace(report.machine, cores_usable=2.0)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(dataclasses.replace(report, machine=host)))
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "threads 2 for ONNX Runtime, or as many as --threads says" in rows
    assert "environment OMP_NUM_THREADS=1" in rows


def test_json_and_table_tell_the_report(tmp_path: Path, onnxruntime_is) -> None:
    onnxruntime_is(None)
    report = report_of(write(tmp_path, gpu_files()), {"numpy": "2.4.6", "tokenizers": "0.23.3"})
    told = json.loads(to_json(report))
    assert told["problems"] == list(report.problems)
    assert told["gpus"][0]["name"] == "NVIDIA L40S"
    assert {"dmtd", "machine", "onnxruntime", "components", "nvidia_driver", "thread_environment"} <= set(told)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    for words in (
        'pip install "dmtd[cpu]"',
        'pip install "dmtd[export]"',
        'pip install "cuda-bindings>=13,<14"',
        "NVIDIA L40S",
        "580.65.06",
    ):
        assert words in text
    lines = [line.rstrip() for line in text.splitlines()]
    for part in report.components:  # a library, a line
        assert any(line.startswith(f"{part.name} ") and line.endswith(f" {part.purpose}") for line in lines), part
    assert "No problems found" not in text


def test_engines_libraries_are_installed_as_everywhere_else(tmp_path: Path, onnxruntime_is) -> None:
    """By the extra, which bounds their version and brings cuda-bindings."""
    told = {part.name: part.install for part in report_of(tmp_path, HEALTHY, {}).components}
    assert all(told[backend] == library.install for backend, library in LIBRARIES.items())


def test_this_machine() -> None:
    report = collect()
    assert report.machine.cores_usable >= 0.01
    assert report.onnxruntime.version == importlib.import_module("onnxruntime").__version__
    numpy = next(part for part in report.components if part.name == "numpy")
    assert numpy.version == importlib.import_module("numpy").__version__


@pytest.mark.parametrize(
    ("versions", "has_gpu", "problem"),
    [
        ({"tensorrt-rtx": "1.7.1", "cuda-bindings": "13.5.0"}, True, None),
        ({"tensorrt-rtx": "1.7.1"}, False, None),  # building needs no GPU and no bindings
        ({"tensorrt-rtx": "1.7.1"}, True, 'cuda-bindings: not installed, .*run: pip install "cuda-bindings>=13,<14"'),
        (
            {"tensorrt-cu13": "10.14.1"},
            False,
            r'tensorrt: got 10\.14\.1, expected 11\.x; run: pip install "dmtd\[tensorrt\]"',
        ),
        ({"cuda-bindings": "12.9.0"}, False, r"cuda-bindings: got 12\.9\.0, expected 13\.x"),
    ],
)
def test_what_keeps_engines_from_running_is_a_problem(
    tmp_path: Path, onnxruntime_is, versions: dict[str, str], has_gpu: bool, problem: str | None
) -> None:
    root = write(tmp_path, gpu_files()) if has_gpu else tmp_path
    problems = report_of(root, {**HEALTHY, **versions}).problems
    if problem is None:
        assert problems == ()
    else:
        [line] = problems
        assert re.match(problem, line)


ON_GPU = {"onnxruntime-gpu": "1.31.1", "numpy": "2.4.6", "tokenizers": "0.23.3", "cuda-bindings": "13.5.0"}


@pytest.mark.parametrize(
    ("cuda", "problem"),
    [
        (needs(), None),
        (
            needs("libcublas.so.13", "libcudart.so.13"),
            r"onnxruntime-gpu: .* links libcublas\.so\.13, libcudart\.so\.13, not found; "
            r'run: pip install "dmtd\[gpu\]"$',
        ),
        (needs("libcudnn.so.9"), r'onnxruntime-gpu: libcudnn\.so\.9 not found, .*run: pip install "dmtd\[gpu\]"$'),
        (needs(driver_cuda="12.8"), r"NVIDIA driver: got 580\.65\.06, expected 580 or newer, which CUDA 13 needs"),
        (
            needs(driver_cuda=None, driver_error="libcuda.so.1: gone"),
            r"NVIDIA driver: its library cannot be loaded \(libcuda\.so\.1: gone\)",
        ),
    ],
)
def test_what_keeps_the_cuda_provider_from_a_gpu_is_a_problem(
    tmp_path: Path, onnxruntime_is, cuda: CudaNeeds, problem: str | None
) -> None:
    onnxruntime_is("1.31.1", "CUDAExecutionProvider", "CPUExecutionProvider")
    problems = report_of(write(tmp_path, gpu_files()), ON_GPU, cuda=cuda).problems
    assert len(problems) == (problem is not None), problems
    assert problem is None or re.match(problem, problems[0])


def test_an_old_driver_is_known_by_its_version_where_its_library_does_not_tell(tmp_path: Path, onnxruntime_is) -> None:
    onnxruntime_is("1.31.1", "CUDAExecutionProvider", "CPUExecutionProvider")
    files = {name: text.replace("580.65.06", "570.86.15") for name, text in gpu_files().items()}
    root = write(tmp_path, files)
    [line] = report_of(root, ON_GPU, cuda=needs(driver_cuda=None)).problems
    assert line.startswith("NVIDIA driver: got 570.86.15, expected 580 or newer")
    assert report_of(root, ON_GPU, cuda=needs(driver_cuda="13.0")).problems == ()  # NVIDIA's cuda-compat serves it


def test_without_a_gpu_missing_cuda_libraries_are_a_gap_that_is_told(tmp_path: Path, onnxruntime_is) -> None:
    onnxruntime_is("1.31.1", "CUDAExecutionProvider", "CPUExecutionProvider")
    report = report_of(
        tmp_path, ON_GPU, cuda=needs("libcublas.so.13", driver_cuda=None, driver_error="libcuda.so.1: gone")
    )
    assert report.problems == ()
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    assert 'missing: libcublas.so.13; pip install "dmtd[gpu]"' in text
    assert "none (CUDA 13 needs 580 or newer)" in text
    told = json.loads(to_json(report))["cuda"]
    assert told["libraries"][0] == {"name": "libcublas.so.13", "error": "gone"}
    assert told["driver_error"] == "libcuda.so.1: gone"


def test_the_cpu_wheel_is_asked_for_no_cuda_library(tmp_path: Path, onnxruntime_is) -> None:
    report = collect(root=tmp_path, environ={}, version_of=HEALTHY.get, look_at_cuda=lambda ort: pytest.fail("looked"))
    assert report.cuda is None


def test_the_cuda_provider_needs_cuda_bindings(tmp_path: Path, onnxruntime_is) -> None:
    onnxruntime_is("1.31.1", "CUDAExecutionProvider", "CPUExecutionProvider")
    versions = {name: version for name, version in ON_GPU.items() if name != "cuda-bindings"}
    [line] = report_of(write(tmp_path, gpu_files()), versions).problems
    assert line.startswith("cuda-bindings: not installed, but --device cuda needs it; run: pip install")
