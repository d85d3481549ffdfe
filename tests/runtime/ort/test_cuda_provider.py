"""What stands between ONNX Runtime's CUDA provider and a GPU is named, with what mends it, and nothing is printed.

The provider and its libraries are stand-ins here; the ELF reader reads real libraries, the probe is run by the real CPU provider.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dmtd_runtime import BackendError
from dmtd_runtime.ort import cuda_provider
from dmtd_runtime.ort.cuda_provider import CUDA_PROVIDER, PROBE, linked_libraries, look, prepare
from dmtd_runtime.ort.library import import_onnxruntime

LINKED = ("libcublasLt.so.13", "libcublas.so.13", "libcudart.so.13", "libcuda.so.1", "libdl.so.2", "libc.so.6")


class FakeSession:
    def __init__(self, provider: str) -> None:
        self.provider, self.fed = provider, []

    def get_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    def run(self, outputs: Any, feeds: dict[str, Any]) -> None:
        self.fed.append(feeds)


class FakeOrt:
    """The onnxruntime module as far as ``prepare`` goes; what it was asked stands in ``asked``."""

    def __init__(self, provider: str = CUDA_PROVIDER, error: str | None = None) -> None:
        self.__file__ = "/nowhere/onnxruntime/__init__.py"
        self.error, self.session = error, FakeSession(provider)
        self.offered, self.asked, self.severities = [CUDA_PROVIDER, "CPUExecutionProvider"], [], []

    def get_available_providers(self) -> list[str]:
        return self.offered

    def preload_dlls(self) -> None:
        print("Failed to load libcublasLt.so.13")
        warnings.warn("no plugin", stacklevel=1)

    def set_default_logger_severity(self, level: int) -> None:
        self.severities.append(level)

    class SessionOptions:
        log_severity_level = 2

    def InferenceSession(self, model: bytes, settings: Any, **options: Any) -> FakeSession:
        self.asked.append((model, settings.log_severity_level, options))
        if self.error is not None:
            raise RuntimeError(self.error)
        return self.session


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with a driver for the given CUDA release, and libraries that do not load."""

    def put(*missing: str, driver_cuda: str | None = "13.0", linked: tuple[str, ...] = LINKED) -> None:
        monkeypatch.setattr(cuda_provider, "linked_libraries", lambda path: linked)
        monkeypatch.setattr(
            cuda_provider, "_loading_error", lambda name: f"{name}: cannot open" if name in missing else None
        )
        monkeypatch.setattr(cuda_provider, "_driver_cuda", lambda: driver_cuda)
        monkeypatch.setattr(cuda_provider, "look_at_gpus", lambda: ((), "570.12"))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put()
    return put


def refusal(ort: Any, device_id: int = 0) -> str:
    with pytest.raises(BackendError) as caught:
        prepare(ort, device_id)
    text = str(caught.value)
    assert "\n" not in text
    assert "export" not in text  # no bundle is to blame
    return text


def test_a_gpu_that_serves_is_looked_at_once(machine, capfd: pytest.CaptureFixture[str]) -> None:
    ort = FakeOrt()
    prepare(ort, 1)
    prepare(ort, 1)
    [(model, severity, options)] = ort.asked
    assert model == PROBE
    assert options == {"providers": [(CUDA_PROVIDER, {"device_id": "1"})], "enable_fallback": 0}
    assert [list(feeds) for feeds in ort.session.fed] == [["a"]]
    assert (severity, ort.severities) == (4, [4, 3])
    prepare(ort, 0)
    assert len(ort.asked) == 2
    assert capfd.readouterr() == ("", "")


def test_a_failure_is_not_remembered(machine) -> None:
    machine("libcublas.so.13")
    ort = FakeOrt()
    assert "libcublas.so.13" in refusal(ort)
    machine()
    prepare(ort)


def test_libraries_that_are_missing_are_named_with_the_extra(machine, capfd: pytest.CaptureFixture[str]) -> None:
    machine("libcublasLt.so.13", "libcublas.so.13", "libcudnn.so.9")
    ort = FakeOrt()
    text = refusal(ort)
    assert "needs libcublasLt.so.13, libcublas.so.13, which cannot be loaded (libcublasLt.so.13: cannot open)" in text
    assert text.endswith('run: pip install "dmtd[gpu]"')
    assert "cudnn" not in text
    assert ort.asked == []  # nothing was opened that can only fail
    assert capfd.readouterr() == ("", "")


def test_cudnn_alone_keeps_nothing_from_opening_but_is_told(machine) -> None:
    machine("libcudnn.so.9")
    ort = FakeOrt()
    prepare(ort)
    assert [library.name for library in look(ort).missing] == ["libcudnn.so.9"]


def test_no_driver_comes_before_missing_libraries(machine) -> None:
    machine(*LINKED)
    text = refusal(FakeOrt())
    assert "device: got cuda, but no NVIDIA driver is on this machine" in text
    assert "580 or newer (https://www.nvidia.com/drivers), or give the container the GPU" in text


def test_an_old_driver_is_told_with_the_one_that_is_needed(machine) -> None:
    machine(driver_cuda="12.8")
    text = refusal(FakeOrt())
    assert "the NVIDIA driver 570.12 takes CUDA 12.8, and this ONNX Runtime is built for CUDA 13" in text
    assert "update the driver to 580 or newer" in text


def test_the_release_is_the_one_that_the_provider_links(machine) -> None:
    machine(driver_cuda="12.8", linked=("libcudart.so.12", "libcuda.so.1"))
    prepare(FakeOrt())
    assert look(FakeOrt()).cuda_major == 12


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "CUDA failure 100: no CUDA-capable device is detected ; GPU=-1",
            r"device is detected; give the container the GPU",
        ),
        (
            "EP\nCUDA failure 101: invalid device ordinal ; GPU=0",
            r"GPU 3 cannot be used: invalid device ordinal; choose one that `nvidia-smi -L` lists$",
        ),
        (
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=0",
            r"insufficient .*CUDA 13 needs 580 or newer",
        ),
        ("CUDA failure 209: no kernel image is available ; GPU=0", r"no kernels for so old a GPU; .*--device cpu"),
        ("CUDA failure 999: unknown error ; GPU=0", r"unknown error; see `dmtd doctor` and `nvidia-smi`"),
        ("something else\nover lines", r"something else; see `dmtd doctor`$"),
        ("", "no message"),
    ],
)
def test_what_the_probe_says_is_one_line_with_its_remedy(machine, error: str, told: str) -> None:
    ort = FakeOrt(error=error)
    with pytest.raises(BackendError, match=told):
        prepare(ort, 3)
    assert ort.severities == [4, 3]


def test_hidden_gpus_are_told(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "(CUDA_VISIBLE_DEVICES is '')" in refusal(FakeOrt(error="CUDA failure 100: no device ; x"))


def test_a_session_on_the_cpu_is_no_cuda_session(machine) -> None:
    text = refusal(FakeOrt(provider="CPUExecutionProvider"))
    assert "cannot load its CUDA provider and takes CPUExecutionProvider" in text


def test_a_wheel_without_the_provider(machine) -> None:
    ort = FakeOrt()
    ort.offered = ["CPUExecutionProvider"]
    assert refusal(ort).endswith('run: pip uninstall -y onnxruntime && pip install "dmtd[gpu]"')


def test_the_probe_is_what_it_claims_to_be() -> None:
    model = onnx.load_from_string(PROBE)
    onnx.checker.check_model(model, full_check=True)
    [node] = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Add", ["a", "a"], ["b"])
    assert (model.ir_version, model.opset_import[0].version) == (10, 21)
    session = import_onnxruntime().InferenceSession(PROBE, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"a": np.full(1, 1.5, np.float32)})
    assert found.tolist() == [3.0]


def test_linked_libraries_are_read_from_the_file(tmp_path: Path) -> None:
    path = Path(import_onnxruntime().__file__).parent / "capi" / "libonnxruntime_providers_shared.so"
    found = linked_libraries(path)
    assert "libc.so.6" in found
    assert all(name.startswith(("lib", "ld-linux")) for name in found)
    data = path.read_bytes()
    for name, text in {"none": b"", "text": b"no library\n" * 20, "half": data[:2000], "small": data[:50]}.items():
        (tmp_path / name).write_bytes(text)
        assert linked_libraries(tmp_path / name) == ()
    assert linked_libraries(tmp_path / "absent") == ()


def test_libraries_are_found_in_nvidias_packages_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "libdmtdtest.so.13"
    assert "cannot open shared object file" in str(cuda_provider._loading_error(name))
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    importlib.invalidate_caches()
    shutil.copy(
        Path(import_onnxruntime().__file__).parent / "capi" / "libonnxruntime_providers_shared.so", folder / name
    )
    assert cuda_provider._loading_error(name) is None
    (folder / "libbroken.so.1").write_bytes(b"no library")
    assert "libbroken.so.1" in str(cuda_provider._loading_error("libbroken.so.1"))
