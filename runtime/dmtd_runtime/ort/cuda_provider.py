"""What ONNX Runtime's CUDA provider needs, looked at before its first session: libraries, a driver, and that it opens.

The provider is a library of its own, which ONNX Runtime loads when a session first asks for it. Where that fails, ONNX
Runtime says so on stdout ("EP Error") or not at all, and goes on with the CPU. ``prepare`` comes before: it finds what is
missing by name, then opens and runs a graph of one node on the GPU. ``look`` is its first half, for ``dmtd doctor``.

cuDNN is loaded when a kernel first needs it (ReduceMax, convolutions, attention where it is asked for), so ``prepare`` does
not ask for it; ``look`` tells of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import mmap
import os
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime.device.libraries import CUDA_MAJOR
from dmtd_runtime.errors import BackendError
from dmtd_runtime.machine.hardware import look_at_gpus

__all__ = ["CUDA_PROVIDER", "CudaNeeds", "Library", "check_cuda_provider", "linked_libraries", "look", "prepare"]

CUDA_PROVIDER = "CUDAExecutionProvider"
DRIVER = "libcuda.so.1"  # comes with the NVIDIA driver, never with a package
CUDNN = "libcudnn.so.9"
OLDEST_DRIVERS = {12: "525", 13: "580"}  # by CUDA release
INSTALL = 'pip install "dmtd[gpu]"'
DRIVER_PAGE = "https://www.nvidia.com/drivers"
# ModelProto, IR 10, opset 21: Add(a, a) -> b over float32 [1]. The runtime has no onnx package; it was made with
#   helper.make_model(helper.make_graph([helper.make_node("Add", ["a", "a"], ["b"])], "probe", [a], [b]),
#                     opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
PROBE = (
    b"\x08\x0a:9\x0a\x0e\x0a\x01a\x0a\x01a\x12\x01b\x22\x03Add\x12\x05probe"
    b"Z\x0f\x0a\x01a\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"
    b"b\x0f\x0a\x01b\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01B\x04\x0a\x00\x10\x15"
)
SILENT, ERRORS = 4, 3  # ONNX Runtime's severities
# What mends an error of the CUDA runtime, by its number.
REMEDIES = {
    2: "free memory on it; see `nvidia-smi`",
    35: "update the driver ({page}), CUDA {cuda} needs {driver} or newer",
    100: "give the container the GPU (docker run --gpus all){visible}; see `nvidia-smi`",
    101: "choose one that `nvidia-smi -L` lists{visible}",
    209: "this ONNX Runtime has no kernels for so old a GPU; run on the CPU with: --device cpu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A shared library by the name it is loaded by; ``error`` is the loader's message, None where it loads."""

    name: str
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaNeeds:
    """What the provider links (without the driver's library), cuDNN last, and the driver.

    ``driver_cuda`` is the newest CUDA release that the driver takes, "13.0"; None where it does not tell.
    """

    cuda_major: int
    libraries: tuple[Library, ...]
    driver_error: str | None
    driver_cuda: str | None

    @property
    def missing(self) -> tuple[Library, ...]:
        return tuple(library for library in self.libraries if library.error is not None)

    @property
    def oldest_driver(self) -> str:
        """The first number of the oldest driver's version, as NVIDIA counts them."""
        return OLDEST_DRIVERS.get(self.cuda_major, OLDEST_DRIVERS[CUDA_MAJOR])

    @property
    def driver_is_too_old(self) -> bool:
        return self.driver_cuda is not None and int(self.driver_cuda.split(".")[0]) < self.cuda_major


@functools.cache
def prepare(ort: Any, device_id: int = 0) -> None:
    """Make sure that CUDA sessions can be opened on a GPU; looked at once for each GPU of a process.

    Nothing is written to stdout or stderr. Afterwards ONNX Runtime's default logger tells errors only: it warns of an
    unregistered plugin at every CUDA session.

    Args:
        ort: the onnxruntime module.
        device_id: which GPU.

    Raises:
        BackendError: the provider, a library, the driver or the GPU is missing or unfit; with what mends it.
    """
    check_cuda_provider(ort)
    needs = look(ort)
    if needs.driver_error is not None:
        raise BackendError(
            f"got cuda, but no NVIDIA driver is on this machine ({needs.driver_error}); install {needs.oldest_driver} or "
            f"newer ({DRIVER_PAGE}), or give the container the GPU (docker run --gpus all)",
            param="device",
        )
    if needs.driver_is_too_old:
        version = look_at_gpus()[1]
        raise BackendError(
            f"got cuda, but the NVIDIA driver{f' {version}' if version else ''} takes CUDA {needs.driver_cuda}, and this ONNX "
            f"Runtime is built for CUDA {needs.cuda_major}; update the driver to {needs.oldest_driver} or newer "
            f"({DRIVER_PAGE})",
            param="device",
        )
    if missing := [library for library in needs.missing if library.name != CUDNN]:
        raise BackendError(
            f"got cuda, but ONNX Runtime's CUDA provider needs {', '.join(library.name for library in missing)}, which "
            f"cannot be loaded ({missing[0].error}); run: {INSTALL}",
            param="device",
        )
    _probe(ort, device_id, needs)


def check_cuda_provider(ort: Any) -> None:
    """BackendError with the fix where this ONNX Runtime cannot use a GPU at all."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {CUDA_PROVIDER}, only {', '.join(ort.get_available_providers())}; "
            f"run: pip uninstall -y onnxruntime && {INSTALL}"
        )


def look(ort: Any) -> CudaNeeds:
    """Load what the CUDA provider links, and cuDNN, and say what fails. Without a word; needs neither GPU nor driver."""
    linked = linked_libraries(Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so")
    # What it prints of libraries that are missing is found below; a warning may be an error where we are embedded.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ort.preload_dlls()
    names = [name for name in linked if name.startswith(("libcu", "libnv")) and name != DRIVER]
    releases = [int(name.rpartition(".")[2]) for name in names if name.startswith("libcudart.so.")]
    return CudaNeeds(
        cuda_major=releases[0] if releases else CUDA_MAJOR,
        libraries=tuple(Library(name=name, error=_loading_error(name)) for name in (*names, CUDNN)),
        driver_error=_loading_error(DRIVER),
        driver_cuda=_driver_cuda(),
    )


def linked_libraries(path: Path) -> tuple[str, ...]:
    """The libraries that a 64-bit little-endian ELF library asks the loader for; none where it is something else."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:6] != b"\x7fELF\x02\x01":
                return ()
            (table,), (size, count) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 58)
            # of each section: type, offset, size, link
            sections = [struct.unpack_from("<4xI16xQQI", data, table + size * index) for index in range(count)]
            found = []
            for kind, offset, length, link in sections:
                if kind != 6:  # SHT_DYNAMIC: pairs of tag and value; its link is the table of strings
                    continue
                for tag, value in struct.iter_unpack("<QQ", data[offset : offset + length // 16 * 16]):
                    if tag == 1:  # DT_NEEDED
                        start = sections[link][1] + value
                        found.append(data[start : data.find(b"\0", start)].decode())
            return tuple(found)
    except (OSError, ValueError, IndexError, struct.error):
        return ()


def _loading_error(name: str) -> str | None:
    """None where the library loads: by name, or out of the folders of NVIDIA's packages, wherever they are installed."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        first = " ".join(str(error).split())
    else:
        return None
    for path in _package_files(name):
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            return " ".join(str(error).split())
        return None
    return first


def _package_files(name: str) -> list[Path]:
    """``nvidia/*/lib/NAME``: preload_dlls looks beside onnxruntime alone, and pip may install into several places."""
    spec = importlib.util.find_spec("nvidia")  # a namespace package
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return [path for folder in folders for path in sorted(Path(folder).glob(f"*/lib/{name}"))]


def _driver_cuda() -> str | None:
    version = ctypes.c_int()
    try:
        if ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _probe(ort: Any, device_id: int, needs: CudaNeeds) -> None:
    """Run one node on the GPU. Its result is the tests' concern: here it is enough that it runs."""
    ort.set_default_logger_severity(SILENT)
    settings = ort.SessionOptions()
    settings.log_severity_level = SILENT
    try:
        # Without the option a failure is printed to stdout, and the session made once more on the CPU.
        session = ort.InferenceSession(
            PROBE, settings, providers=[(CUDA_PROVIDER, {"device_id": str(device_id)})], enable_fallback=0
        )
        found = session.get_providers()[0]
        if found == CUDA_PROVIDER:
            session.run(None, {"a": np.ones(1, np.float32)})
    except Exception as error:
        raise BackendError(
            f"got cuda, but GPU {device_id} cannot be used: {_reason(str(error), needs)}", param="device"
        ) from error
    finally:
        ort.set_default_logger_severity(ERRORS)
    if found != CUDA_PROVIDER:
        raise BackendError(
            f"got cuda, but ONNX Runtime cannot load its CUDA provider and takes {found}; run: pip install "
            "--force-reinstall --no-deps onnxruntime-gpu, and see `dmtd doctor`",
            param="device",
        )


def _reason(message: str, needs: CudaNeeds) -> str:
    """What ONNX Runtime says of a CUDA error, in one line, and what mends it."""
    failure = re.search(r"CUDA failure (\d+): ([^;\n]+)", message)
    if failure is None:
        return f"{(message.strip().splitlines() or ['no message'])[0][:300]}; see `dmtd doctor`"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
    remedy = REMEDIES.get(int(failure[1]), "see `dmtd doctor` and `nvidia-smi`").format(
        page=DRIVER_PAGE, cuda=needs.cuda_major, driver=needs.oldest_driver, visible=hidden
    )
    return f"{failure[2].strip()}; {remedy}"
