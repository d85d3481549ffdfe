"""The distribution: what the wheel and the sdist hold and ask pip for, and that the tree stays fit for packaging."""

from __future__ import annotations

import email
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

PACKAGE_FOLDERS = {
    "dmtd_export": "dmtd_export",
    "runtime/dmtd_errors": "dmtd_errors",
    "runtime/dmtd_runtime": "dmtd_runtime",
    "models/dmtd_models": "dmtd_models",
}
KERNELS = "runtime/dmtd_runtime/ort/kernels"
HAS_KERNELS = (sys.platform, platform.machine()) == ("linux", "x86_64")
for_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the kernels are for Linux on x86-64")
NOT_IN_THE_WHEEL = {
    "dmtd_export/README.md",
    "runtime/dmtd_runtime/server/README.md",
    "models/dmtd_models/reference/testing.py",
    *(
        f"{KERNELS}/{name}"
        for name in ("onnxruntime_abi.h", "operator.c", "packing.c", "packing.h", "products.c", "products.h")
    ),
}
NOT_PACKAGES = ("runtime", "models", "tools", "tests", "study")
ADAPTER = "/adapter_model.safetensors"


def tracked_files(root: Path) -> list[str]:
    """Files of the working tree that git tracks or would: what a clone of the next commit holds."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("needs a git checkout, to know which files belong to the project")
    return sorted(name for name in set(listed.stdout.split("\0")) - {""} if (root / name).is_file())


@pytest.fixture(scope="module")
def source_copy(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("source")
    for name in tracked_files(repo_root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repo_root / name, target / name)
    return target


def build(source: Path, kind: str, target: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)],
        cwd=source,
        env={name: value for name, value in os.environ.items() if name != "CC"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source_copy, "wheel", tmp_path_factory.mktemp("wheel"))


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def text_in(wheel: Path, end_of_name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(end_of_name))
        return archive.read(name).decode()


def stated_version(repo_root: Path) -> str:
    found = re.search(
        r'^__version__ = "(.+)"$', (repo_root / "runtime/dmtd_runtime/version.py").read_text(), re.MULTILINE
    )
    assert found, "version.py states no version"
    return found.group(1)


def expected_wheel_files(repo_root: Path) -> set[str]:
    packaged = {
        package + name.removeprefix(folder)
        for name in set(tracked_files(repo_root)) - NOT_IN_THE_WHEEL
        for folder, package in PACKAGE_FOLDERS.items()
        if name.startswith(folder + "/")
    }
    info = f"dmtd-{stated_version(repo_root)}.dist-info"
    if HAS_KERNELS:
        packaged.add("dmtd_runtime/ort/kernels/libdmtd_kernels.so")
    return packaged | {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path, repo_root: Path) -> None:
    names = names_in(wheel)
    assert names == expected_wheel_files(repo_root)
    for package in PACKAGE_FOLDERS.values():
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert not [name for name in names if name.split("/")[0] in NOT_PACKAGES]


@for_kernels
def test_the_wheel_is_for_the_machines_that_its_library_is_for(wheel: Path) -> None:
    """glibc 2.17 is manylinux2014's; what it links is read from the library itself."""
    assert wheel.name.endswith("-py3-none-manylinux_2_17_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("dmtd_runtime/ort/kernels/libdmtd_kernels.so")
    versions = {tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_([0-9.]+)\0", library)}
    assert versions and max(versions) <= (2, 17)


NO_ZIGLANG = "import sys; sys.modules['ziglang'] = None; from hatchling.cli import hatchling; sys.exit(hatchling())"


def build_with(copy: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (copy / KERNELS / "libdmtd_kernels.so").unlink(missing_ok=True)
    return subprocess.run(
        [sys.executable, "-c", NO_ZIGLANG, "build", "-t", "wheel", "-d", str(target)],
        cwd=copy,
        env={name: value for name, value in os.environ.items() if name != "CC"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@for_kernels
@pytest.mark.parametrize("fails", [False, True])
def test_without_a_compiler_that_works_the_wheel_is_one_of_python_alone(
    source_copy: Path, tmp_path: Path, fails: bool
) -> None:
    if fails:
        (tmp_path / "clang").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "clang").chmod(0o755)
    copy = shutil.copytree(source_copy, tmp_path / "source")
    done = build_with(copy, tmp_path / "dist", PATH=f"{tmp_path}:/usr/bin:/bin" if fails else "/nowhere")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("failed:" if fails else "there is no C compiler") in done.stdout + done.stderr
    (built,) = (tmp_path / "dist").glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl") and not [name for name in names_in(built) if name.endswith(".so")]


@for_kernels
def test_a_compiler_that_was_asked_for_and_is_not_there_is_an_error(source_copy: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source_copy, tmp_path / "source")
    done = build_with(copy, tmp_path / "dist", CC="/nowhere/cc")
    assert (
        done.returncode != 0 and "CC=/nowhere/cc: /nowhere/cc cannot be run (No such file or directory)" in done.stderr
    )


CONSUMER = """
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dmtd_runtime import LLM, CompletionOutput, Delta, DmtdError, RequestOutput, SamplingParams
from dmtd_runtime.bundle.manifest import Manifest


def answers(directory: Path, prompt: str) -> Iterator[str]:
    try:
        with LLM(directory, max_num_seqs=2) as llm:
            found = llm.generate([prompt, "and"], SamplingParams(temperature=0, max_tokens=4))
            assert_type(found, list[RequestOutput])
            assert_type(found[0].outputs[0], CompletionOutput)
            for delta in llm.stream(prompt):
                assert_type(delta, Delta)
                yield delta.text
    except DmtdError as error:
        yield str(error)


def export(source: Path, target: Path) -> Manifest:
    with open_checkpoint(source) as checkpoint:
        assert_type(checkpoint, Checkpoint)
    return export_bundle(source, target, ExportOptions(split=SplitOptions(decoding_layers=8, cycle_length=4)))


LLM(1, max_num_seqs="2")  # type: ignore[arg-type]  # told only if the packages' types are read
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment's interpreter, with the wheel and none of its dependencies."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    [packages] = place.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return place / "bin" / "python"


def test_an_installed_wheel_brings_three_names_and_shadows_none(installed: Path, tmp_path: Path) -> None:
    """A user's own folders ``runtime``, ``models`` and ``tools`` stay what they are."""
    for name in NOT_PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(f"NAME = {name!r}")
    code = (
        "import importlib.metadata as m, json, sys\n"
        f"names = {NOT_PACKAGES!r}\n"
        "own = [__import__(f'{name}.own', fromlist=['NAME']).NAME for name in names]\n"
        "paths = [list(sys.modules[name].__path__) for name in names]\n"
        "tops = sorted({file.parts[0] for file in m.files('dmtd') or () if '.dist-info' not in file.parts[0]})\n"
        "print(json.dumps([own, paths, tops]))"
    )
    done = subprocess.run([installed, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    own, paths, tops = json.loads(done.stdout)
    assert own == list(NOT_PACKAGES)
    assert [[Path(path).resolve() for path in each] for each in paths] == [
        [(tmp_path / name).resolve()] for name in NOT_PACKAGES
    ]
    assert tops == sorted(PACKAGE_FOLDERS.values())


def test_a_users_project_type_checks_strictly_against_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(installed), "consumer.py"]
    environ = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_wheel_metadata(wheel: Path, repo_root: Path) -> None:
    metadata = email.message_from_string(text_in(wheel, "METADATA"))
    assert metadata["Name"] == "dmtd"
    assert metadata["Version"] == stated_version(repo_root)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) >= {"cpu", "gpu", "export", "oracle", "demo", "dev"}
    assert text_in(wheel, "entry_points.txt").split() == [
        "[console_scripts]",
        "dmtd",
        "=",
        "dmtd_export.cli.__main__:main",
    ]


def test_base_dependencies_are_the_runtimes_without_an_onnxruntime_wheel(wheel: Path) -> None:
    metadata = email.message_from_string(text_in(wheel, "METADATA"))
    base = {
        re.split(r"[^A-Za-z0-9._-]", line)[0].lower()
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert base == {"numpy", "tokenizers", "jinja2", "typer", "rich"}


def test_no_extra_brings_both_onnxruntime_wheels(repo_root: Path) -> None:
    # They own the same folder, and pip does not notice.
    extras = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def closure(name: str) -> set[str]:
        found = set()
        for requirement in extras[name]:
            inner = re.fullmatch(r"dmtd\[(.+)\]", requirement)
            if inner:
                found |= {part for extra in inner.group(1).split(",") for part in closure(extra)}
            else:
                found.add(re.split(r"[^A-Za-z0-9._-]", requirement)[0])
        return found

    for name in extras:
        assert not {"onnxruntime", "onnxruntime-gpu"} <= closure(name), name
    assert "onnxruntime" in closure("cpu") & closure("dev") & closure("demo")
    assert not {"onnxruntime", "onnxruntime-gpu"} & closure("test")
    assert closure("gpu") == {"onnxruntime-gpu", "nvidia-cublas", "cuda-bindings"}


def test_the_gpu_extra_brings_what_the_cuda_provider_links(repo_root: Path) -> None:
    """The wheel's own extras name no cuBLAS, which its provider links first; that cuDNN's package asks for it is luck."""
    extras = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [line.partition(">=")[0] for line in extras["gpu"]] == [
        "onnxruntime-gpu[cuda,cudnn]",
        "nvidia-cublas",
        "cuda-bindings",
    ]


def test_the_wheel_is_small_and_downloads_nothing(wheel: Path) -> None:
    """What fetches packages is the study's. What lm-eval needs of the network, lm-eval fetches, and is asked for by name."""
    assert wheel.stat().st_size < 900_000  # 500,000 before there was a server, 800,000 before the kernels
    with zipfile.ZipFile(wheel) as archive:
        sources = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    fetching = re.compile(
        r"\burllib\.request\b|^\s*(?:import|from) (?:urllib|requests|httpx)\b|\"pip\"|apt-get|snapshot_download|hf_hub_download",
        re.MULTILINE,
    )
    assert [name for name, source in sources.items() if fetching.search(source)] == []


def test_the_folders_around_the_packages_are_no_packages(repo_root: Path) -> None:
    assert [folder for folder in NOT_PACKAGES if (repo_root / folder / "__init__.py").exists()] == []


def test_sdist_holds_what_a_build_and_a_test_run_need(source_copy: Path, repo_root: Path, tmp_path: Path) -> None:
    sdist = build(source_copy, "sdist", tmp_path / "sdist")
    prefix = f"dmtd-{stated_version(repo_root)}"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(prefix + "/") for name in archive.getnames()}
        # Python before 3.11.4 knows no filters; the archive is our own.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    folders = ("dmtd_export/", "runtime/", "models/", "tests/", "tools/")
    wanted = {name for name in tracked_files(repo_root) if name.startswith(folders) and not name.endswith(ADAPTER)}
    assert sdist.stat().st_size < 2_000_000
    top = {"pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert wanted | top <= names
    # hatchling adds its own metadata and .gitignore, which it needs to build the same wheel again.
    assert names - wanted == top | {"PKG-INFO", ".gitignore"}
    assert names_in(build(tmp_path / prefix, "wheel", tmp_path / "wheel")) == expected_wheel_files(repo_root)
