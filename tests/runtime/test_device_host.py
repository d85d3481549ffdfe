"""The host device: it computes, and it refuses what a GPU would do silently wrong. One test a rule of its docstring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dmtd_export.build.options import BuildOptions
from dmtd_export.build.run import build_engines
from dmtd_export.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.testing import write_tiny_checkpoint
from dmtd_runtime import contract
from dmtd_runtime.device.base import ALIGNMENT, Address, EngineContext, aligned, check_room
from dmtd_runtime.device.host import HostDevice, SeamError
from dmtd_runtime.engine_record import EngineRecord
from dmtd_runtime.errors import BackendError
from dmtd_runtime.manifest import DTYPE_BYTES

SIZES = {"batch": 1, "window_len": 3, "late_len": 1, "visible_len": 16, "num_logits": 1}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineRecord]:
    root = tmp_path_factory.mktemp("host_device")
    source = write_tiny_checkpoint(root / "model", layers=3, max_positions=64)
    export_bundle(source, root / "bundle", ExportOptions(decoding_layers=1, cycle_length=3, target="tensorrt"))
    result = build_engines(root / "bundle", BuildOptions(flavour="host", max_batch=2))
    return result.directory, result.record


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


def written(device: HostDevice, num_bytes: int) -> Address:
    address = device.alloc(num_bytes, "numbers")
    device.zero(address, num_bytes)
    return address


def settle(device: HostDevice) -> None:
    device.wait(device.mark())


class Bound:
    """An engine with a buffer of its own for every input and output."""

    def __init__(self, device: HostDevice, engines: tuple[Path, EngineRecord], graph: contract.GraphName) -> None:
        self.device = device
        directory, record = engines
        self.file = record.engine(graph)
        self.engine = device.load_engine(directory / self.file.file)
        shapes = {
            info.name: tuple(SIZES[dim] if isinstance(dim, str) else dim for dim in info.dims)
            for info in (*self.file.inputs, *self.file.outputs)
        }
        scratch = written(device, self.engine.scratch_bytes)
        inputs = {info.name: shapes[info.name] for info in self.file.inputs}
        self.context: EngineContext = self.engine.context(0, inputs, scratch, self.engine.scratch_bytes)
        self.addresses: dict[str, Address] = {}
        for info in (*self.file.inputs, *self.file.outputs):
            alias = self.file.aliases.get(info.name)
            count = int(np.prod(shapes[info.name])) * DTYPE_BYTES[info.dtype]
            self.addresses[info.name] = self.addresses[alias] if alias else written(device, count)
            self.context.set_address(info.name, self.addresses[info.name])

    def write(self, numbers: Mapping[str, int]) -> None:
        for name, number in numbers.items():
            staging = self.device.alloc_host(8)
            staging.view(np.int64)[:] = number
            self.device.upload(self.addresses[name], staging)


def test_the_stream_is_lazy_and_in_order(device: HostDevice) -> None:
    staging, back = device.alloc_host(8), device.alloc_host(8)
    address = device.alloc(8, "numbers")
    staging[:] = 1
    device.upload(address, staging)
    staging[:] = 2  # too early: a GPU may not have read it yet
    device.download(back, address)
    assert back.sum() == 0
    settle(device)
    assert back.tolist() == [2] * 8


def test_copies_of_rows_with_pitches(device: HostDevice) -> None:
    staging, back = device.alloc_host(12), device.alloc_host(12)
    staging[:] = np.arange(12)
    source, target = device.alloc(12, "source"), written(device, 12)
    device.upload(source, staging)
    device.copy(target, Address(source + 1), row_bytes=2, rows=3, target_pitch=3, source_pitch=4)
    device.download(back, target)
    settle(device)
    assert back.tolist() == [1, 2, 0, 5, 6, 0, 9, 10, 0, 0, 0, 0]
    with pytest.raises(SeamError, match="pitches 1, 4 below the row's 2 bytes"):
        device.copy(target, source, row_bytes=2, rows=3, target_pitch=1, source_pitch=4)


def test_memory_is_aligned_counted_and_starts_as_nan(device: HostDevice) -> None:
    free = device.memory()[0]
    addresses = [device.alloc(count, "some") for count in (1, 300, 7)]
    assert [address % ALIGNMENT for address in addresses] == [0, 0, 0]
    assert device.memory()[0] == free - 308
    assert np.isnan(device.tensor(addresses[1], 4, "x")[0].data[:4].view(np.float32)).all()
    for address in addresses:
        device.free(address)
    assert device.memory()[0] == free
    with pytest.raises(BackendError, match="out of memory for huge"):
        device.alloc(1 << 40, "huge")


# Rule 1.
def test_addresses_must_be_aligned_live_and_large_enough(device: HostDevice) -> None:
    address = written(device, 1000)
    with pytest.raises(SeamError, match="not a multiple of 256"):
        device.tensor(address + 8, 8, "x")
    with pytest.raises(SeamError, match="x: 1001 bytes from 0 pass the end of numbers, 1000"):
        device.tensor(address, 1001, "x")
    device.free(address)
    with pytest.raises(SeamError, match="lies in no allocation"):
        device.zero(address, 8)


# Rule 2.
def test_a_cache_is_updated_in_place_and_nothing_else_overlaps(
    device: HostDevice, engines: tuple[Path, EngineRecord]
) -> None:
    bound = Bound(device, engines, contract.LATE_DECODE)
    bound.context.enqueue()
    settle(device)
    name = next(iter(bound.file.aliases))
    elsewhere = written(device, 1 << 20)
    bound.context.set_address(name, elsewhere)
    with pytest.raises(SeamError, match="must lie at the address of past_key_values"):
        bound.context.enqueue()
    bound.context.set_address(name, bound.addresses[name])
    bound.context.set_address(contract.LOGITS, bound.addresses[contract.THOUGHT])
    with pytest.raises(SeamError, match=r"overlaps|pass the end"):
        bound.context.enqueue()


# Rule 3.
def test_bytes_that_nothing_has_written_are_not_read(device: HostDevice, engines: tuple[Path, EngineRecord]) -> None:
    bound = Bound(device, engines, contract.LATE_DECODE)
    bound.context.set_address(contract.THOUGHT, device.alloc(1 << 12, "fresh"))
    bound.context.enqueue()
    with pytest.raises(SeamError, match="thought: byte 0 of fresh is read before anything has written it"):
        settle(device)


# Rule 4.
@pytest.mark.parametrize(("first", "message"), [(-1, "writes rows -1"), (5, "rows from 0 are not written")])
def test_cache_rows_are_written_in_order_and_in_range(
    device: HostDevice, engines: tuple[Path, EngineRecord], first: int, message: str
) -> None:
    bound = Bound(device, engines, contract.LATE_DECODE)
    bound.write({contract.write_indices("late"): first})
    bound.context.enqueue()
    with pytest.raises(SeamError, match=message):
        settle(device)


def test_a_window_past_the_capacity_is_refused(device: HostDevice, engines: tuple[Path, EngineRecord]) -> None:
    bound = Bound(device, engines, contract.THINKING)
    capacity = engines[1].capacity
    bound.write({contract.write_indices("thinking"): capacity - 2})
    bound.context.enqueue()
    with pytest.raises(SeamError, match=f"writes rows {capacity - 2} to {capacity} of {capacity}"):
        settle(device)


# Rule 5.
def test_a_capture_records_device_work_alone(device: HostDevice) -> None:
    address, staging = written(device, 8), device.alloc_host(8)
    settle(device)
    for touch, message in (
        (lambda: device.upload(address, staging), "an upload within a capture"),
        (lambda: device.download(staging, address), "a download within a capture"),
        (lambda: device.alloc(8, "more"), "allocating more within a capture"),
        (lambda: device.wait(device.mark()), "a mark within a capture"),
    ):
        with pytest.raises(SeamError, match=message):
            device.capture(touch)  # type: ignore[arg-type]
    assert device.captures == 0


def test_a_replay_runs_the_same_work_on_the_same_addresses(
    device: HostDevice, engines: tuple[Path, EngineRecord]
) -> None:
    bound = Bound(device, engines, contract.CHOOSE_TOKEN)
    with pytest.raises(SeamError, match="has not run before"):
        device.capture(bound.context.enqueue)
    bound.context.enqueue()
    capture = device.capture(bound.context.enqueue)
    bound.context.set_address(contract.TOKEN_IDS, written(device, 8))  # behind the capture, so not of it
    vocab = bound.file.inputs[0].dims[-1]
    assert isinstance(vocab, int)
    staging, back = device.alloc_host(vocab * 4), device.alloc_host(8)
    staging.view(np.float32)[77] = 3.0
    device.upload(bound.addresses[contract.LOGITS], staging)
    device.download(back, bound.addresses[contract.TOKEN_IDS])
    settle(device)
    assert back.view(np.int64).item() == 0  # captured, not run
    device.replay(capture)
    device.download(back, bound.addresses[contract.TOKEN_IDS])
    settle(device)
    assert back.view(np.int64).item() == 77


# Rule 6.
def test_only_page_locked_memory_goes_up_and_down(device: HostDevice) -> None:
    address = written(device, 16)
    with pytest.raises(SeamError, match="not page-locked"):
        device.upload(address, np.zeros(16, np.uint8))
    with pytest.raises(SeamError, match="not page-locked"):
        device.download(device.alloc_host(32)[::2], address)


def test_shapes_must_fit_the_engine(device: HostDevice, engines: tuple[Path, EngineRecord]) -> None:
    directory, record = engines
    file = record.engine(contract.CHOOSE_TOKEN)
    engine, scratch = device.load_engine(directory / file.file), written(device, 4096)
    with pytest.raises(SeamError, match="logits: got shape"):
        engine.context(0, {contract.LOGITS: (1, 1, 3)}, scratch, 4096)
    with pytest.raises(SeamError, match="scratch: got 0 bytes"):
        engine.context(0, {}, scratch, 0)


def test_room_is_checked_with_numbers() -> None:
    device = HostDevice(memory_bytes=3_000_000_000)
    check_room(device, {"engines": 2_000_000_000}, "use less")
    with pytest.raises(BackendError) as refused:
        check_room(device, {"engines": 2_000_000_000, "caches": 1_500_000_000}, "use less")
    assert str(refused.value) == (
        "host device: 3.50 GB needed (engines 2.00 GB, caches 1.50 GB), 3.00 of 3.00 GB free; use less"
    )
    assert [aligned(count) for count in (0, 1, 256, 257)] == [256, 256, 256, 512]
