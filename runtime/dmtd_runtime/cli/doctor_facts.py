"""What this machine offers and what is installed: the facts behind ``dmtd doctor``.

``collect`` looks (``machine/hardware.py``, package metadata, ONNX Runtime's list of providers), ``render`` and ``to_json`` only
tell. Nothing here repairs or installs: every gap and every problem carries the command that closes it. No heavy library
is imported except ONNX Runtime, which alone knows its execution providers; where it is built for CUDA, what its CUDA
provider links is loaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dmtd_runtime.device.libraries import CUDA_BACKENDS, CUDA_MAJOR, LIBRARIES
from dmtd_runtime.errors import BackendError
from dmtd_runtime.machine.hardware import Gpu, Machine, look_at_gpus, look_at_machine, threads_of
from dmtd_runtime.ort.cuda_provider import CUDA_PROVIDER, CUDNN, DRIVER_PAGE, CudaNeeds, look
from dmtd_runtime.ort.kernels.library import LIBRARY, OFF, VARIABLE, instruction_set
from dmtd_runtime.version import __version__

__all__ = ["Component", "OnnxRuntime", "Report", "collect", "render", "to_json"]

VersionOf = Callable[[str], str | None]
LookAtCuda = Callable[[Any], CudaNeeds]

# (distribution, what it is for, oldest version, pip's argument that brings it)
COMPONENTS = (
    ("numpy", "arrays", "2.0", "dmtd"),
    ("tokenizers", "tokenizer", "0.22", "dmtd"),
    ("onnx", "export, verify", "1.23", "dmtd[export]"),
    ("safetensors", "checkpoints", "0.6", "dmtd[export]"),
    ("gguf", "GGUF files", "0.19", "dmtd[export]"),
    ("ml-dtypes", "bfloat16 weights", "0.5", "dmtd[export]"),
    ("torch", "oracle of verify, finetune, evaluate", "2.6", "dmtd[oracle]"),
    ("matplotlib", "plots", "3.9", "dmtd[evaluate]"),
    ("transformers", "finetune", "5.17", "dmtd[train]"),
    ("accelerate", "finetune", "1.10", "dmtd[train]"),
    ("datasets", "finetune", "4.1", "dmtd[train]"),
    ("peft", "finetune", "0.18", "dmtd[train]"),
    ("lm-eval", "evaluate --lm-eval", "0.4.12", "dmtd[lm-eval]"),
    ("fastapi", "serve", "0.115", "dmtd[serve]"),
    ("uvicorn", "serve", "0.35", "dmtd[serve]"),
    ("pydantic", "serve", "2.10", "dmtd[serve]"),
    ("pyyaml", "serve --config", "6", "dmtd[serve]"),
    ("llguidance", "answers of a form", "1.8", "dmtd[structured]"),
    ("polygraphy", "inspecting graphs", "0.53.6", "dmtd[dev]"),
    ("tensorrt", "TensorRT engines", None, "dmtd[tensorrt]"),
    ("tensorrt-rtx", "TensorRT-RTX engines", None, "dmtd[tensorrt-rtx]"),
    ("cuda-bindings", "CUDA without torch", None, f"cuda-bindings>={CUDA_MAJOR},<{CUDA_MAJOR + 1}"),
)
_ONNXRUNTIMES = {"onnxruntime": "dmtd[cpu]", "onnxruntime-gpu": "dmtd[gpu]"}
# TensorRT's distributions carry the CUDA release in their name.
ALIASES = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
ONNXRUNTIME_OLDEST = "1.31"
THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("KMP_AFFINITY", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One library: its installed version, or None and the command that installs it."""

    name: str
    purpose: str
    version: str | None
    install: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntime:
    """The installed ONNX Runtime distributions by name, and what importing the folder they share gives."""

    distributions: Mapping[str, str]
    version: str | None
    providers: tuple[str, ...]
    import_error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything ``dmtd doctor`` says. ``problems`` are one line each and end in the fix.

    ``cuda`` is what the CUDA provider needs, None where ONNX Runtime has none. ``products``: the instructions of our own products
    over quantised weights, None where they are ONNX Runtime's.
    """

    dmtd: str
    machine: Machine
    products: str | None
    onnxruntime: OnnxRuntime
    components: tuple[Component, ...]
    gpus: tuple[Gpu, ...]
    nvidia_driver: str | None
    cuda: CudaNeeds | None
    thread_environment: Mapping[str, str]
    problems: tuple[str, ...]


def collect(
    *,
    root: Path = Path("/"),
    environ: Mapping[str, str] | None = None,
    version_of: VersionOf | None = None,
    look_at_cuda: LookAtCuda = look,
) -> Report:
    """Look at the machine.

    Args:
        root: where /proc and /sys are found.
        environ: the environment variables; the process's own by default.
        version_of: the installed version of a distribution or None; package metadata by default.
        look_at_cuda: what the CUDA provider of an onnxruntime module needs.
    """
    version_of = version_of or _installed_version
    environ = os.environ if environ is None else environ
    components = tuple(
        Component(name=name, purpose=purpose, version=_first_version(name, version_of), install=_pip_line(argument))
        for name, purpose, _, argument in COMPONENTS
    )
    runtime = _onnxruntime(version_of)
    products, products_problem = _products()
    gpus, driver = look_at_gpus(root)
    cuda = look_at_cuda(sys.modules["onnxruntime"]) if CUDA_PROVIDER in runtime.providers else None
    return Report(
        dmtd=__version__,
        machine=look_at_machine(root),
        products=products,
        onnxruntime=runtime,
        components=components,
        gpus=gpus,
        nvidia_driver=driver,
        cuda=cuda,
        thread_environment={name: environ[name] for name in THREAD_VARIABLES if name in environ},
        problems=(
            *products_problem,
            *_onnxruntime_problems(runtime, has_gpu=bool(gpus)),
            *_component_problems(components),
            *_engine_problems(components, has_gpu=bool(gpus), cuda_provider=cuda is not None),
            *(_cuda_problems(cuda, driver) if cuda is not None and gpus else ()),
        ),
    )


def to_json(report: Report) -> str:
    """The report as JSON text; keys are the field names."""
    return json.dumps(dataclasses.asdict(report), indent=2)


def render(report: Report) -> Group:
    """The report for a terminal: machine, libraries, what installs those that are missing, problems; in 80 columns."""
    machine = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _machine_rows(report):
        machine.add_row(Text(name, style="bold"), Text(value))
    rows = [(name, report.onnxruntime.distributions.get(name), "running bundles") for name in _ONNXRUNTIMES]
    rows += [(part.name, part.version, part.purpose) for part in report.components]
    libraries = Table(box=None, pad_edge=False)
    for heading in ("library", "version", "for"):
        libraries.add_column(heading, overflow="fold")
    for name, version, purpose in rows:
        libraries.add_row(name, _version_text(version), purpose)
    verdict = [Text(f"problem: {line}", style="red") for line in report.problems] or [
        Text("No problems found.", style="green")
    ]
    return Group(machine, Text(), libraries, Text(), *_gaps(report), *verdict)


def _gaps(report: Report) -> Iterator[Table | Text]:
    """What is missing, behind the command that installs it."""
    missing: dict[str, list[str]] = {}
    if not report.onnxruntime.distributions:  # one of the two is enough
        missing |= {_pip_line(extra): [name] for name, extra in _ONNXRUNTIMES.items()}
    for part in report.components:
        if part.version is None:
            missing.setdefault(part.install, []).append(part.name)
    if missing:
        commands = Table(box=None, pad_edge=False)
        commands.add_column("to install", no_wrap=True)  # a command is there to be copied
        commands.add_column("what is missing", overflow="fold")
        for command, names in missing.items():
            commands.add_row(Text(command), ", ".join(names))
        yield from (commands, Text())


def _version_text(version: str | None) -> Text:
    return Text(version, style="green") if version else Text("-", style="dim")


def _machine_rows(report: Report) -> list[tuple[str, str]]:
    host = report.machine
    total, available = (_gib(value) for value in (host.memory_total_bytes, host.memory_available_bytes))
    rows = [
        ("dmtd", report.dmtd),
        ("Python", host.python),
        ("platform", host.platform),
        ("CPU", f"{host.cpu} ({' '.join(host.isa) or 'instruction sets unknown'})"),
        ("4 and 8 bits", _products_text(report)),
        ("cores", f"{host.cores_usable:g} usable of {host.cores_present}"),
        ("memory", f"{available} available of {total}"),
        (
            "huge pages",
            "turned off: decoding on the CPU is slower" if host.huge_pages == "never" else host.huge_pages or "none",
        ),
        ("providers", ", ".join(report.onnxruntime.providers) or "none"),
        ("NVIDIA driver", _driver_text(report)),
    ]
    if report.cuda is not None:
        missing = ", ".join(library.name for library in report.cuda.missing)
        hint = f"missing: {missing}; {_pip_line('dmtd[gpu]')}" if missing else "all there"
        rows.append((f"CUDA {report.cuda.cuda_major} libraries", hint))
    for gpu in report.gpus:
        memory = f", {gpu.memory_mib} MiB" if gpu.memory_mib else ""
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        rows.append(("GPU", f"{gpu.name}{memory}{capability}"))
    variables = " ".join(f"{name}={value}" for name, value in report.thread_environment.items())
    threads = f"{threads_of(host.cores_usable)} for ONNX Runtime, or as many as --threads says"
    return [*rows, ("threads", threads), ("environment", variables or "no variable of threads or devices set")]


def _products() -> tuple[str | None, tuple[str, ...]]:
    """Instructions of our own products, and what keeps them from running."""
    try:
        return instruction_set(), ()
    except BackendError as error:
        return None, (str(error),)


def _products_text(report: Report) -> str:
    if report.products is not None:
        return f"dmtd's own products, {report.products}"
    if _products()[1]:
        return "none: see the problem below"
    if os.environ.get(VARIABLE) == OFF:
        return f"ONNX Runtime's products: {VARIABLE}={OFF}"
    built = "this processor has no AVX2 and FMA" if LIBRARY.is_file() else "dmtd's were not built on installation"
    return f"ONNX Runtime's products, slower: {built}"


def _driver_text(report: Report) -> str:
    version, cuda = report.nvidia_driver or "none", report.cuda
    if cuda is None:
        return version
    newest = f"takes CUDA {cuda.driver_cuda}; " if cuda.driver_cuda else ""
    return f"{version} ({newest}CUDA {cuda.cuda_major} needs {cuda.oldest_driver} or newer)"


def _gib(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"


def _pip_line(argument: str) -> str:
    return f'pip install "{argument}"' if set("[<>") & set(argument) else f"pip install {argument}"


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_version(name: str, version_of: VersionOf) -> str | None:
    found = (version_of(alias) for alias in ALIASES.get(name, (name,)))
    return next((version for version in found if version), None)


def _onnxruntime(version_of: VersionOf) -> OnnxRuntime:
    distributions = {name: version for name in _ONNXRUNTIMES if (version := version_of(name))}
    try:
        module = importlib.import_module("onnxruntime")
        providers = tuple(str(name) for name in module.get_available_providers())
        version, error = str(module.__version__), None
    # A broken installation fails in many ways (missing library, half a folder): all of them belong in the report.
    except Exception as failure:  # noqa: BLE001
        providers, version, error = (), None, f"{type(failure).__name__}: {failure}".splitlines()[0]
    return OnnxRuntime(distributions=distributions, version=version, providers=providers, import_error=error)


def _onnxruntime_problems(runtime: OnnxRuntime, *, has_gpu: bool) -> tuple[str, ...]:
    wanted = _pip_line("dmtd[gpu]" if has_gpu else "dmtd[cpu]")
    names = tuple(runtime.distributions)
    if len(names) == 2:
        return (
            "onnxruntime: found both onnxruntime and onnxruntime-gpu, which own the same folder, expected one of them; "
            f"run: pip uninstall -y onnxruntime onnxruntime-gpu && {wanted}",
        )
    if runtime.version is None and not names:
        return (
            f"onnxruntime: not installed, expected one of its wheels; run: {_pip_line('dmtd[cpu]')}, or with an "
            f"NVIDIA GPU: {_pip_line('dmtd[gpu]')}",
        )
    if runtime.version is None:
        again = _pip_line("dmtd[gpu]" if "onnxruntime-gpu" in names else "dmtd[cpu]")
        return (
            f"onnxruntime: installed but fails to import ({runtime.import_error}); "
            f"run: pip uninstall -y {names[0]} && {again}",
        )
    problems = []
    if _older(runtime.version, ONNXRUNTIME_OLDEST):
        again = _pip_line("dmtd[gpu]" if "onnxruntime-gpu" in names else "dmtd[cpu]")
        problems.append(f"onnxruntime: got {runtime.version}, expected {ONNXRUNTIME_OLDEST} or newer; run: {again}")
    if has_gpu and "onnxruntime-gpu" in names and "CUDAExecutionProvider" not in runtime.providers:
        problems.append(
            "onnxruntime-gpu: got no CUDAExecutionProvider on a machine with a GPU, "
            "its folder was probably overwritten; "
            f"run: pip install --force-reinstall --no-deps onnxruntime-gpu=={runtime.distributions['onnxruntime-gpu']}"
        )
    return tuple(problems)


def _component_problems(components: tuple[Component, ...]) -> tuple[str, ...]:
    oldest = {name: version for name, _, version, _ in COMPONENTS}
    problems = []
    for part in components:
        limit = oldest[part.name]
        if part.version is None and part.install == _pip_line("dmtd"):
            problems.append(f"{part.name}: not installed, but the runtime needs it; run: pip install {part.name}")
        elif part.version is not None and limit is not None and _older(part.version, limit):
            problems.append(f"{part.name}: got {part.version}, expected {limit} or newer; run: {part.install}")
    return tuple(problems)


def _engine_problems(components: tuple[Component, ...], *, has_gpu: bool, cuda_provider: bool) -> tuple[str, ...]:
    """What keeps a TensorRT library or the CUDA provider from a GPU; building engines needs neither it nor a driver."""
    versions = {part.name: part.version for part in components}
    problems, installed = [], [backend for backend in CUDA_BACKENDS if versions[backend] is not None]
    for backend in installed:
        if _major(str(versions[backend])) != LIBRARIES[backend].major:
            problems.append(
                f"{backend}: got {versions[backend]}, expected {LIBRARIES[backend].major}.x; run: {LIBRARIES[backend].install}"
            )
    bindings, fix = versions["cuda-bindings"], f'pip install "cuda-bindings>={CUDA_MAJOR},<{CUDA_MAJOR + 1}"'
    users = [f"{backend} needs it to run engines" for backend in installed]
    users += ["--device cuda needs it"] if cuda_provider else []
    if users and has_gpu and bindings is None:
        problems.append(f"cuda-bindings: not installed, but {users[0]}; run: {fix}")
    elif bindings is not None and _major(bindings) != CUDA_MAJOR:
        problems.append(f"cuda-bindings: got {bindings}, expected {CUDA_MAJOR}.x; run: {fix}")
    return tuple(problems)


def _cuda_problems(cuda: CudaNeeds, driver: str | None) -> tuple[str, ...]:
    """What keeps ONNX Runtime's CUDA provider from a GPU that is there."""
    problems, fix = [], _pip_line("dmtd[gpu]")
    older = driver is not None and _older(driver, cuda.oldest_driver)
    # The library tells for sure: a newer one may serve an older driver (NVIDIA's cuda-compat packages).
    if cuda.driver_is_too_old or (cuda.driver_cuda is None and older):
        problems.append(
            f"NVIDIA driver: got {driver or 'one for CUDA ' + str(cuda.driver_cuda)}, expected {cuda.oldest_driver} or newer, "
            f"which CUDA {cuda.cuda_major} needs; update it: {DRIVER_PAGE}"
        )
    if cuda.driver_error is not None:
        problems.append(
            f"NVIDIA driver: its library cannot be loaded ({cuda.driver_error}); install it ({DRIVER_PAGE}), or give the "
            "container the GPU: docker run --gpus all"
        )
    if linked := [library.name for library in cuda.missing if library.name != CUDNN]:
        problems.append(f"onnxruntime-gpu: its CUDA provider links {', '.join(linked)}, not found; run: {fix}")
    if any(library.name == CUDNN for library in cuda.missing):
        problems.append(f"onnxruntime-gpu: {CUDNN} not found, which some of its CUDA kernels load; run: {fix}")
    return tuple(problems)


def _major(version: str) -> int:
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def _older(version: str, limit: str) -> bool:
    """Compare the leading numbers only: a release candidate of the limit counts as the limit."""
    ours, theirs = (
        tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3]) for text in (version, limit)
    )
    return ours + (0,) * (3 - len(ours)) < theirs + (0,) * (3 - len(theirs))
