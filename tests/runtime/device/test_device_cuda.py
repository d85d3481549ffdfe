"""The CUDA device without a GPU: its calls held against the installed libraries, its lines run over the simulator."""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from device_support import Engines, engine_backend, run_sequences, simulator_engines, tokens_of
from fake_cuda import Context, CudaEngine, CudaError, FakeCuda, FakeRtx, RuntimeCache, RuntimeConfig, install_fakes

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import Manifest, load_manifest
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.device import cuda
from dmtd_runtime.device.base import Address
from dmtd_runtime.device.cuda import CudaDevice
from dmtd_runtime.device.libraries import gpu_here, import_cuda, import_tensorrt, look_at_gpu
from dmtd_runtime.device.simulator.device import SimulatedDevice
from dmtd_runtime.errors import BackendError
from dmtd_runtime.sampling.params import SamplingParams


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install_fakes(monkeypatch)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Engines]:
    root = tmp_path_factory.mktemp("cuda")
    source = write_tiny_checkpoint(root / "model", layers=3, max_positions=64)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=1, cycle_length=3, cycle_origin="prompt", prompt_input="thinking"),
        target="tensorrt",
    )
    export_bundle(source, root / "bundle", options)
    return (
        root / "bundle",
        load_manifest(root / "bundle"),
        simulator_engines(root / "bundle", max_num_seqs=2, buckets=(16,)),
    )


PARAMS = [SamplingParams(temperature=0.0, max_tokens=24), SamplingParams(temperature=0.8, top_k=9, max_tokens=13)]


def run(bundle: tuple[Path, Manifest, Engines], device: Any) -> list[list[int]]:
    directory, manifest, engines = bundle
    backend = engine_backend(directory, manifest, engines, slots=2, device=device)
    plan, vocab = CyclePlan(cycle=manifest.cycle), manifest.model.vocab_size
    told = run_sequences(backend, plan, vocab, [[1, 2, 3], [4, 5]], PARAMS)
    backend.close()
    return [tokens_of(events) for events in told]


def test_the_cuda_device_runs_the_backend_as_the_host_device_does(
    fake: FakeCuda, bundle: tuple[Path, Manifest, Engines]
) -> None:
    assert run(bundle, CudaDevice("tensorrt-rtx")) == run(bundle, SimulatedDevice())
    called = {name for name, _ in fake.calls}
    for name in ("cudaGraphLaunch", "cudaMemcpy2DAsync", "cudaEventSynchronize", "cudaStreamDestroy", "cudaSetDevice"):
        assert name in called


def test_every_call_is_one_that_cuda_bindings_have(fake: FakeCuda, bundle: tuple[Path, Manifest, Engines]) -> None:
    run(bundle, CudaDevice("tensorrt-rtx"))
    calls, fakes = set(fake.calls), dict(sys.modules)
    for name in ("cuda.bindings", "cuda.bindings.runtime"):
        del sys.modules[name]
    real = pytest.importorskip("cuda.bindings.runtime")
    sys.modules.update({name: fakes[name] for name in ("cuda.bindings", "cuda.bindings.runtime")})
    for name, count in calls:
        signature = (getattr(real, name).__doc__ or "").strip().splitlines()[0]
        found = re.fullmatch(rf"{name}\((.*)\)", signature)
        assert found, signature
        assert len([p for p in found[1].split(",") if p.strip()]) == count, signature
    for enum, member in (
        ("cudaError_t", "cudaErrorInsufficientDriver"),
        ("cudaMemcpyKind", "cudaMemcpyDeviceToDevice"),
        ("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal"),
    ):
        assert hasattr(getattr(real, enum), member)
    for number in ("cudaStreamNonBlocking", "cudaHostAllocDefault", "cudaEventDisableTiming"):
        assert getattr(real, number) == getattr(FakeCuda, number)


def test_every_name_is_one_that_tensorrt_rtx_has() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for ours, theirs in (
        (CudaEngine, trt.ICudaEngine),
        (Context, trt.IExecutionContext),
        (RuntimeConfig, trt.IRuntimeConfig),
        (RuntimeCache, trt.IRuntimeCache),
    ):
        for name in vars(ours):
            if not name.startswith("_") and name not in ("read", "asked"):
                assert hasattr(theirs, name), name
    for name in ("device_memory_size_v2", "num_io_tensors"):
        assert hasattr(trt.ICudaEngine, name)
    for name, member in (
        ("TensorLocation", "DEVICE"),
        ("TensorIOMode", "INPUT"),
        ("ExecutionContextAllocationStrategy", "USER_MANAGED"),
        ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
        ("CudaGraphStrategy", "DISABLED"),
        ("ProfilingVerbosity", "NONE"),
        ("ComputeCapability", "SM80"),
    ):
        assert hasattr(getattr(trt, name), member)
    for name in (
        "set_execution_context_allocation_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "cuda_graph_strategy",
    ):
        assert hasattr(trt.IRuntimeConfig, name)
    assert hasattr(trt.IExecutionContext, "nvtx_verbosity")
    for dtype in ("FLOAT", "HALF", "BF16", "INT64", "INT32", "BOOL"):
        assert hasattr(trt.DataType, dtype)


def test_engines_that_cannot_be_captured_run_without_graphs(
    fake: FakeCuda,
    bundle: tuple[Path, Manifest, Engines],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = run(bundle, SimulatedDevice())
    monkeypatch.setattr(FakeRtx, "capturable", False)
    assert run(bundle, CudaDevice("tensorrt-rtx")) == wanted
    assert "cycles run without CUDA graphs: thinking.onnx cannot be captured" in caplog.text
    assert fake.host._recording is None


def test_closing_frees_engines_and_contexts_at_once(
    fake: FakeCuda, bundle: tuple[Path, Manifest, Engines], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when garbage is collected: the next device may need the memory of their weights."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    for kind in (CudaEngine, Context):
        monkeypatch.setattr(kind, "__init__", _counted(kind.__init__, alive))
    directory, manifest, engines = bundle
    gc.collect()
    gc.disable()
    try:
        backend = engine_backend(directory, manifest, engines, slots=2, device=CudaDevice("tensorrt-rtx"))
        run_sequences(backend, CyclePlan(cycle=manifest.cycle), manifest.model.vocab_size, [[1, 2, 3]], PARAMS[0])
        contexts = [each for each in alive if isinstance(each, Context)]
        # Single steps: two of the prefill, one that chooses. Cycles: thinking, late_decode and the choice, for each bucket.
        assert len(alive) - len(contexts) == 4
        assert len(contexts) == len({id(each) for each in contexts}) >= 6
        del contexts
        backend.close()
        assert not list(alive)
    finally:
        gc.enable()


def _counted(init: Any, alive: weakref.WeakSet[Any]) -> Any:
    def wrapped(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        alive.add(self)

    return wrapped


def test_a_library_that_cannot_start_is_one_line(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FakeRtx, log: Any) -> None:
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(FakeRtx, "Runtime", broken)
    with pytest.raises(BackendError, match=r"tensorrt-rtx cannot start on GPU 0 \(Fake GPU\): .*`dmtd doctor`"):
        CudaDevice("tensorrt-rtx")
    assert ("cudaStreamDestroy", 1) in fake.calls


def test_a_damaged_engine_is_one_line_with_the_fix(fake: FakeCuda, tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"damaged engine")
    with pytest.raises(BackendError) as refused:
        CudaDevice("tensorrt-rtx").load_engine(tmp_path / "x.engine")
    assert str(refused.value) == (
        f"{tmp_path}/x.engine cannot be loaded on GPU 0 (Fake GPU): the header does not conform; "
        "build the engines again with: dmtd build BUNDLE --force"
    )


def test_an_engine_refused_by_a_gpu_that_the_library_does_not_name_leads_to_the_other_library(
    fake: FakeCuda, tmp_path: Path
) -> None:
    fake.capability = (9, 0)
    (tmp_path / "x.engine").write_bytes(b"damaged engine")
    with pytest.raises(
        BackendError, match=r"conform; TensorRT-RTX does not name compute capability 9.0: dmtd build BUNDLE"
    ):
        CudaDevice("tensorrt-rtx").load_engine(tmp_path / "x.engine")


def test_gpus_are_numbered_as_nvidia_smi_numbers_them(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert gpu_here().name == "Fake GPU"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")  # said by the user
    gpu_here()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_compiled_kernels_are_kept_for_the_next_time(
    fake: FakeCuda, bundle: tuple[Path, Manifest, Engines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(RuntimeCache, "read", [])
    wanted = run(bundle, CudaDevice("tensorrt-rtx"))
    files = sorted((tmp_path / "dmtd" / "kernels").iterdir())
    assert len(files) == 4  # thinking, late_decode and the two that choose
    assert RuntimeCache.read == []
    files[0].write_bytes(b"damaged")
    assert run(bundle, CudaDevice("tensorrt-rtx")) == wanted
    assert sorted(RuntimeCache.read) == [b"damaged", b"kernels", b"kernels", b"kernels"]
    assert files[0].read_bytes() == b"kernels"
    assert sorted((tmp_path / "dmtd" / "kernels").iterdir()) == files


def test_kernels_are_saved_after_the_first_run_of_each_context(
    fake: FakeCuda, bundle: tuple[Path, Manifest, Engines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the engine is released, which a process that is killed never comes to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(RuntimeCache, "asked", 0)
    directory, manifest, engines = bundle
    backend = engine_backend(directory, manifest, engines, slots=2, device=CudaDevice("tensorrt-rtx"))
    assert RuntimeCache.asked == 0
    plan, vocab = CyclePlan(cycle=manifest.cycle), manifest.model.vocab_size
    run_sequences(backend, plan, vocab, [[1, 2, 3]], PARAMS[0])
    assert RuntimeCache.asked == len(backend._engines._contexts)
    assert len(list((tmp_path / "dmtd" / "kernels").iterdir())) == 3  # nothing was sampled
    backend.close()


def test_a_compilation_is_logged_with_its_shape(
    fake: FakeCuda,
    bundle: tuple[Path, Manifest, Engines],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, execute = [0.0], Context.execute_async_v3

    def slow(self: Context, stream_handle: int) -> bool:
        clock[0] += 0.4 if self._engine.tensors.get("token_ids") else 0.05
        return execute(self, stream_handle)

    monkeypatch.setattr(cuda, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Context, "execute_async_v3", slow)
    caplog.set_level("INFO", "dmtd.cuda")
    run(bundle, CudaDevice("tensorrt-rtx"))
    lines = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert "choose_token.onnx: 0.4 s to start with logits [1, 1, 128]: kernels were compiled" in lines
    assert not [line for line in lines if "thinking" in line or "late_decode" in line]
    assert len(lines) < 12  # first runs only


def test_engines_say_nothing_to_profilers_and_are_asked_before_a_capture(
    fake: FakeCuda, bundle: tuple[Path, Manifest, Engines], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, asked, execute, ask = list[str](), list[bool](), Context.execute_async_v3, Context.is_stream_capturable

    def noted(self: Context, stream_handle: int) -> bool:
        seen.append(self.nvtx_verbosity)
        return execute(self, stream_handle)

    def noted_ask(self: Context, stream: int) -> bool:
        asked.append(fake.host.capturing)
        return ask(self, stream)

    monkeypatch.setattr(Context, "execute_async_v3", noted)
    monkeypatch.setattr(Context, "is_stream_capturable", noted_ask)
    run(bundle, CudaDevice("tensorrt-rtx"))
    assert set(seen) == {"NONE"}
    assert asked and not any(asked)


def test_errors_of_cuda_are_named(fake: FakeCuda) -> None:
    device = CudaDevice("tensorrt-rtx")
    fake.failing["cudaMalloc"] = CudaError.cudaErrorMemoryAllocation
    with pytest.raises(
        BackendError, match=r"GPU 0 \(Fake GPU\): no memory for caches, 3.00 GB: .*cudaErrorMemoryAllocation"
    ):
        device.alloc(3_000_000_000, "caches")


def test_marks_may_be_waited_for_in_any_order_and_twice(fake: FakeCuda) -> None:
    device = CudaDevice("tensorrt-rtx")
    address, staging = device.alloc(4, "x"), device.alloc_host(4)
    staging[:] = 9
    first = device.mark()
    device.upload(Address(address), staging)
    second = device.mark()
    for mark in (second, first, second):
        device.wait(mark)
    back = device.alloc_host(4)
    device.download(back, address)
    device.wait(device.mark())
    assert back.tolist() == [9, 9, 9, 9]
    device.close()
    device.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"driver": 0}, "no NVIDIA driver on this machine; install one .* --backend onnxruntime"),
        ({"driver": 12080}, r"the NVIDIA driver supports CUDA 12\.8, expected at least 13\.0; update the driver"),
        ({"count": 0}, "no NVIDIA GPU can be used"),
        ({"count": 1, "device_id": 3}, r"device_id: got 3, expected 0 to 0"),
    ],
)
def test_what_a_machine_lacks_is_told(fake: FakeCuda, change: dict[str, int], message: str) -> None:
    device_id = change.pop("device_id", 0)
    for name, value in change.items():
        setattr(fake, name, value)
    with pytest.raises(BackendError, match=message):
        CudaDevice("tensorrt-rtx", device_id=device_id)


def test_libraries_of_another_version_or_none_are_told(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert import_tensorrt("tensorrt-rtx") is sys.modules["tensorrt_rtx"]
    with pytest.raises(BackendError, match=r'tensorrt cannot be imported .*pip install "dmtd\[tensorrt\]"'):
        import_tensorrt("tensorrt")
    monkeypatch.setattr(FakeRtx, "__version__", "2.0.1")
    with pytest.raises(BackendError, match=r"tensorrt-rtx: got version 2\.0\.1, expected 1\.x; run: pip install"):
        import_tensorrt("tensorrt-rtx")
    monkeypatch.setattr(sys.modules["cuda.bindings"], "__version__", "12.9.0")
    with pytest.raises(BackendError, match=r"cuda-bindings is 12\.9\.0, expected 13\.x; run: pip install"):
        import_cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="cuda-bindings cannot be imported"):
        import_cuda()


def test_this_machine_without_a_gpu_gets_one_line() -> None:
    """The real libraries, where there is no driver."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    with pytest.raises(BackendError, match="no NVIDIA driver on this machine"):
        look_at_gpu(runtime, 0)


@pytest.mark.gpu
def test_memory_copies_and_capture_on_a_gpu() -> None:
    importlib.import_module("cuda.bindings.runtime")
    device = CudaDevice("tensorrt-rtx")
    staging, back = device.alloc_host(1024), device.alloc_host(1024)
    staging[:] = np.arange(1024) % 251
    one, two = device.alloc(1024, "one"), device.alloc(1024, "two")
    device.upload(one, staging)
    device.zero(two, 1024)
    device.wait(device.mark())
    captured = device.capture(lambda: device.copy(two, one, row_bytes=8, rows=16, target_pitch=16, source_pitch=8))
    device.replay(captured)
    device.download(back, two)
    device.wait(device.mark())
    rows = back[:256].reshape(16, 16)
    assert rows[:, :8].ravel().tolist() == (np.arange(128) % 251).tolist()
    assert not rows[:, 8:].any()
    device.close()
