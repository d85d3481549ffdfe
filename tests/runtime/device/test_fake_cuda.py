"""The stand-ins of CUDA and TensorRT-RTX refuse what a driver and the library would take, and do wrong."""

from __future__ import annotations

from typing import Any

import pytest
from device_support import Engines, simulator_engines
from fake_cuda import FakeCuda, install_fakes

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.device.base import Address
from dmtd_runtime.device.cuda import CudaDevice
from dmtd_runtime.device.simulator.device import SeamError
from dmtd_runtime.errors import BackendError

VOCAB = 128  # of the tiny checkpoint


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install_fakes(monkeypatch)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    root = tmp_path_factory.mktemp("fake_cuda")
    source = write_tiny_checkpoint(root / "model", layers=3, max_positions=64)
    export_bundle(
        source, root / "bundle", ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3), target="tensorrt")
    )
    return simulator_engines(root / "bundle", max_num_seqs=2)


def made(engines: Engines, device: CudaDevice) -> tuple[Any, dict[str, tuple[int, ...]], Address]:
    """An engine, its shapes, activation memory."""
    directory, record = engines
    engine = device.load_engine(directory / record.engine("choose_token").file)
    shapes = {"logits": (1, 1, VOCAB)}
    return engine, shapes, device.alloc(engine.scratch_bytes, "activations")


def test_the_stand_in_refuses_what_a_capture_does_not_hold(fake: FakeCuda, engines: Engines) -> None:
    device = CudaDevice("tensorrt-rtx")
    engine, shapes, scratch = made(engines, device)
    context = engine.context(0, shapes, scratch, engine.scratch_bytes)
    for work, message in (
        (lambda: engine.context(0, shapes, scratch, engine.scratch_bytes), "making a context within a capture"),
        (lambda: made(engines, device), "loading an engine within a capture"),
        (context.is_capturable, "asking whether a context may be captured within a capture"),
        (lambda: CudaDevice("tensorrt-rtx"), "starting the library within a capture"),
        (lambda: context._context.set_optimization_profile_async(0, device.stream), "choosing a profile within"),
        (lambda: context._context.set_input_shape("logits", shapes["logits"]), "choosing a shape within"),
    ):
        with pytest.raises(SeamError, match=message):
            device.capture(work)
        assert not fake.host.capturing


def test_the_stand_in_refuses_activations_that_are_missing_small_or_shared(fake: FakeCuda, engines: Engines) -> None:
    device, other = CudaDevice("tensorrt-rtx"), CudaDevice("tensorrt-rtx")
    engine, shapes, scratch = made(engines, device)
    with pytest.raises(SeamError, match="scratch: got 100 bytes"):
        engine.context(0, shapes, scratch, 100)
    with pytest.raises(
        BackendError, match=r"logits: got \[3, 1, 128\], profile 0 takes \[1, 1, 128\] to \[2, 1, 128\]; "
    ):
        engine.context(0, {"logits": (3, 1, VOCAB)}, scratch, engine.scratch_bytes)
    with pytest.raises(BackendError, match="no profile 1: "):
        engine.context(1, shapes, scratch, engine.scratch_bytes)
    bare = engine._create()
    with pytest.raises(SeamError, match="runs without activation memory"):
        bare.execute_async_v3(device.stream)
    here = engine.context(0, shapes, scratch, engine.scratch_bytes)
    there = made(engines, other)[0].context(0, shapes, scratch, engine.scratch_bytes)
    for each in (here, there):
        for name, size in (("logits", 4 * shapes["logits"][-1]), ("token_ids", 8), ("is_finite", 1), ("confidence", 4)):
            address = device.alloc(size, name)
            device.zero(address, size)
            each.set_address(name, address)
    with pytest.raises(SeamError, match=r"address .* is not a multiple of 256"):
        here.set_address("logits", Address(address + 8))
    here.enqueue()
    with pytest.raises(SeamError, match="one activation memory in different streams"):
        there.enqueue()
