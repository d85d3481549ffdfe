"""Which library a build takes, for which GPU, and the line that says what is missing. No library is needed here."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from dmtd_export.engines import library as builder
from dmtd_export.engines.library import Library, configure, load_library, target_of
from dmtd_export.engines.plan import Target
from dmtd_runtime.bundle.engine_record import EngineBackend
from dmtd_runtime.device.libraries import GpuFacts, capabilities, import_cuda, import_tensorrt
from dmtd_runtime.errors import BackendError
from dmtd_runtime.machine.hardware import Gpu

H200 = Gpu(name="NVIDIA H200", memory_mib=143771, compute_capability="9.0")


def module(version: str, name: str = "tensorrt_rtx") -> types.ModuleType:
    made = types.ModuleType(name)
    made.__version__ = version  # type: ignore[attr-defined]
    members = {"NONE": 0, "CURRENT": 1, "SM75": 75, "SM80": 80, "SM89": 89, "SM120": 120}
    made.ComputeCapability = types.SimpleNamespace(__members__=members)  # type: ignore[attr-defined]
    return made


def install(patch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """``sys.modules`` with these versions; None: cannot be imported."""
    for name, version in versions.items():
        patch.setitem(sys.modules, name, None if version is None else module(version, name))  # type: ignore[arg-type]


def gpus(patch: pytest.MonkeyPatch, *found: Gpu) -> None:
    patch.setattr(builder, "look_at_gpus", lambda: (found, None))

    def gpu_here() -> GpuFacts:
        if not found:
            raise BackendError("no NVIDIA driver on this machine")
        return GpuFacts(device_id=0, name=found[0].name, compute_capability=str(found[0].compute_capability))

    patch.setattr(builder, "gpu_here", gpu_here)


def test_ctrl_c_while_a_library_starts_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of C++ tells it as an ImportError, which once sent people to pip."""

    def interrupted(name: str) -> types.ModuleType:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr("importlib.import_module", interrupted)
    for call in (load_library, import_tensorrt):
        with pytest.raises(KeyboardInterrupt):
            call("tensorrt-rtx")
    with pytest.raises(KeyboardInterrupt):
        import_cuda()


def test_without_a_gpu_rtx_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt="11.4.0", tensorrt_rtx="1.7.1")
    gpus(monkeypatch)
    assert load_library(None).backend == "tensorrt-rtx"
    gpus(monkeypatch, H200)
    assert load_library(None).backend == "tensorrt"


def test_what_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, H200)
    install(monkeypatch, tensorrt=None, tensorrt_rtx="1.7.1")
    assert (load_library(None).backend, load_library(None).version) == ("tensorrt-rtx", "1.7.1")


def test_nothing_installed_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch)
    install(monkeypatch, tensorrt=None, tensorrt_rtx=None)
    with pytest.raises(
        BackendError, match=r'needs TensorRT-RTX or TensorRT: .*; run: pip install "dmtd\[tensorrt-rtx\]"'
    ):
        load_library(None)
    with pytest.raises(BackendError, match=r'tensorrt cannot be imported .*; run: pip install "dmtd\[tensorrt\]"'):
        load_library("tensorrt")


@pytest.mark.parametrize(
    ("name", "version", "expected"), [("tensorrt", "10.14.1", "11.x"), ("tensorrt-rtx", "2.0.0", "1.x")]
)
def test_another_major_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: EngineBackend, version: str, expected: str
) -> None:
    install(monkeypatch, **{name.replace("-", "_"): version})
    with pytest.raises(BackendError, match=f"got version {version}, expected {expected}; run: pip install"):
        load_library(name)


def test_rtx_builds_for_any_gpu_or_one_it_knows() -> None:
    library = Library(backend="tensorrt-rtx", version="1.7.1", module=module("1.7.1"))
    assert target_of(library, None).label == target_of(library, "any").label == "any-tensorrt-rtx-1.7.1"
    assert target_of(library, "12.0").label == "sm120-tensorrt-rtx-1.7.1"
    assert target_of(library, None).supported == ("8.0", "8.9", "12.0")
    for other in ("9.0", "13.0", "Ada"):
        with pytest.raises(
            BackendError,
            match=rf"got {other}, TensorRT-RTX 1.7.1 names 8.0, 8.9, 12.0; leave it out: .* capability 8.0 and later$",
        ):
            target_of(library, other)


def test_turing_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = (
        r"engines need 8.0 or later: TensorRT's attention does, and no bfloat16 or float32 .*--backend onnxruntime$"
    )
    library = Library(backend="tensorrt-rtx", version="1.7.1", module=module("1.7.1"))
    with pytest.raises(BackendError, match=rf"^compute_capability: got 7.5, {reason}"):
        target_of(library, "7.5")
    assert list(capabilities(library.module)) == ["8.0", "8.9", "12.0"]
    gpus(monkeypatch, Gpu(name="NVIDIA T4", memory_mib=None, compute_capability="7.5"))
    with pytest.raises(BackendError, match=rf"^NVIDIA T4 has compute capability 7.5, {reason}"):
        target_of(Library(backend="tensorrt", version="11.4.0", module=module("11.4.0")), None)


def test_tensorrt_builds_for_the_gpu_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(backend="tensorrt", version="11.4.0", module=module("11.4.0"))
    gpus(monkeypatch, H200)
    target = target_of(library, None)
    assert (target.label, target.gpu_name) == ("sm90-tensorrt-11.4.0", "NVIDIA H200")
    with pytest.raises(BackendError, match="builds for the machine it runs on"):
        target_of(library, "8.9")
    gpus(monkeypatch)
    with pytest.raises(BackendError, match=r"for: no NVIDIA driver on this machine; .*--backend tensorrt-rtx"):
        target_of(library, None)


class FakeConfig:
    """The few calls of an IBuilderConfig that differ between the backends."""

    def __init__(self) -> None:
        self.flags: set[str] = {"TF32"}
        self.cache: object = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"of another version" else b"cache of " + content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
        assert not ignore_mismatch
        self.cache = cache


def fake_library(name: EngineBackend) -> Library:
    made = module("0")
    made.BuilderFlag = types.SimpleNamespace(TF32="TF32", REQUIRE_USER_ALLOCATION="USER")  # type: ignore[attr-defined]
    made.ProfilingVerbosity = types.SimpleNamespace(DETAILED="detailed")  # type: ignore[attr-defined]
    return Library(backend=name, version="0", module=made)


@pytest.mark.parametrize(
    ("content", "expected"), [(None, b"cache of "), (b"x", b"cache of x"), (b"of another version", b"cache of ")]
)
def test_tensorrt_starts_from_its_timing_cache(tmp_path: Path, content: bytes | None, expected: bytes) -> None:
    file = tmp_path / "timing.cache"
    if content is not None:
        file.write_bytes(content)
    config, target = FakeConfig(), Target(backend="tensorrt", version="0")
    assert configure(fake_library("tensorrt"), config, target, file) == expected == config.cache
    assert config.flags == set()  # no TF32


def test_rtx_has_no_timing_cache_and_asks_for_capturable_engines(tmp_path: Path) -> None:
    config, target = FakeConfig(), Target(backend="tensorrt-rtx", version="0")
    assert configure(fake_library("tensorrt-rtx"), config, target, tmp_path / "none") is None
    assert config.flags == {"USER"} and config.cache is None
