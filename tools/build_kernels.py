"""Compiles the kernels of dmtd_runtime/ort/kernels while a wheel is built or the repository is installed; hatchling calls it.

They are for Linux on x86-64. Elsewhere, and where no compiler is found, the wheel is one of Python alone, and ONNX Runtime's own
kernels run in their place. `CC` names a compiler; without it the one in the package ziglang is taken, which pip brings along,
so that nothing else must be installed and every build has the same code; then clang, then gcc.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("runtime/dmtd_runtime/ort/kernels")
LIBRARY = FOLDER / "libdmtd_kernels.so"
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
OBJECTS = (("products.c", AVX2), ("products.c", AVX512), ("packing.c", ("-mf16c",)), ("operator.c", ()))
GLIBC = "2.17"  # of manylinux2014, with ziglang; other compilers link this machine's


class CompilationError(Exception):
    """A compiler that cannot be run, or fails."""


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """hatchling's hook: adds the library to a wheel, and puts it into the tree for an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        compiler, tag = _compiler()
        fault = None if compiler else "there is no C compiler"
        if compiler:
            try:
                compile_library(Path(self.root), compiler)
            except CompilationError as error:
                if "CC" in os.environ:  # asked for
                    raise CompilationError(
                        f"CC={os.environ['CC']}: {error}; unset CC for the compiler of ziglang"
                    ) from error
                fault = str(error)
        if fault:
            self.app.display_warning(f"products over quantised weights will be ONNX Runtime's own, and slower: {fault}")
            return
        build_data["artifacts"].append(str(LIBRARY))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"


def _compiler() -> tuple[list[str] | None, str]:
    """The compiler's command, None where there is none, and the platform that its libraries are for."""
    here = "linux_x86_64"
    if given := os.environ.get("CC"):
        return shlex.split(given), here
    if importlib.util.find_spec("ziglang") is not None:
        target = f"x86_64-linux-gnu.{GLIBC}"
        return [sys.executable, "-m", "ziglang", "cc", "-target", target], f"manylinux_{GLIBC.replace('.', '_')}_x86_64"
    found = shutil.which("clang") or shutil.which("gcc")
    return [found] if found else None, here


def compile_library(root: Path, compiler: list[str]) -> None:
    """Write the library beside its sources, whole or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), f"{folder}/cache")
        environment = {**caches, **os.environ}  # ziglang's, which would be left behind in the home directory
        objects = [f"{folder}/{i}.o" for i in range(len(OBJECTS))]
        for (source, flags), made in zip(OBJECTS, objects, strict=True):
            _run([*compiler, *FLAGS, *flags, "-c", str(root / FOLDER / source), "-o", made], environment)
        library = Path(folder, LIBRARY.name)
        _run([*compiler, "-shared", "-s", *objects, "-lpthread", "-o", str(library)], environment)
        beside = root / LIBRARY.with_suffix(f".{os.getpid()}")
        shutil.copy(library, beside)
        beside.replace(root / LIBRARY)


def _run(command: list[str], environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilationError(f"{command[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise CompilationError(f"{shlex.join(command)} failed:\n{done.stderr}")


if __name__ == "__main__":
    found, _ = _compiler()
    if found is None:
        raise SystemExit("error: no C compiler; run: pip install ziglang")
    compile_library(Path(__file__).resolve().parents[1], found)
