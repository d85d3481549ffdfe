"""The simulator: it computes, and it refuses what a GPU would do silently wrong. One test a rule of its docstring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from device_support import simulator_engines

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import EngineRecord
from dmtd_runtime.bundle.manifest import DTYPE_BYTES
from dmtd_runtime.device.base import ALIGNMENT, Address, EngineContext, aligned, check_room
from dmtd_runtime.device.simulator.device import SeamError, SimulatedDevice
from dmtd_runtime.device.simulator.engine import SimulatedEngine
from dmtd_runtime.errors import BackendError

SIZES = {"batch": 1, "window_len": 3, "late_len": 1, "visible_len": 16, "num_logits": 1}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineRecord]:
    root = tmp_path_factory.mktemp("simulator")
    source = write_tiny_checkpoint(root / "model", layers=3, max_positions=64)
    export_bundle(
        source, root / "bundle", ExportOptions(split=SplitOptions(decoding_layers=1, cycle_length=3), target="tensorrt")
    )
    return simulator_engines(root / "bundle", max_num_seqs=2, buckets=(16,))


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


def written(device: SimulatedDevice, num_bytes: int) -> Address:
    address = device.alloc(num_bytes, "numbers")
    device.zero(address, num_bytes)
    return address


def settle(device: SimulatedDevice) -> None:
    device.wait(device.mark())


class Bound:
    """An engine with a buffer of its own for every input and output."""

    def __init__(
        self, device: SimulatedDevice, engines: tuple[Path, EngineRecord], graph: contract.GraphName, **changes: int
    ) -> None:
        self.device, sizes = device, {**SIZES, **changes}
        directory, record = engines
        self.file = record.engine(graph)
        self.engine = device.load_engine(directory / self.file.file)
        shapes = {
            info.name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in info.dims)
            for info in (*self.file.inputs, *self.file.outputs)
        }
        scratch = written(device, self.engine.scratch_bytes)
        inputs = {info.name: shapes[info.name] for info in self.file.inputs}
        self.inputs, self.scratch = inputs, scratch
        self.context: EngineContext = self.engine.context(0, inputs, scratch, self.engine.scratch_bytes)
        self.addresses: dict[str, Address] = {}
        for info in (*self.file.inputs, *self.file.outputs):
            alias = self.file.aliases.get(info.name)
            count = int(np.prod(shapes[info.name])) * DTYPE_BYTES[info.dtype]
            self.addresses[info.name] = self.addresses[alias] if alias else written(device, count)
            self.context.set_address(info.name, self.addresses[info.name])

    def new_context(self) -> EngineContext:
        return self.engine.context(0, self.inputs, self.scratch, self.engine.scratch_bytes)

    def write(self, numbers: Mapping[str, int]) -> None:
        for name, number in numbers.items():
            staging = self.device.alloc_host(8)
            staging.view(np.int64)[:] = number
            self.device.upload(self.addresses[name], staging)


def test_the_stream_is_lazy_and_in_order(device: SimulatedDevice) -> None:
    staging, back = device.alloc_host(8), device.alloc_host(8)
    address = device.alloc(8, "numbers")
    staging[:] = 1
    device.upload(address, staging)
    staging[:] = 2  # too early: a GPU may not have read it yet
    device.download(back, address)
    assert back.sum() == 0
    settle(device)
    assert back.tolist() == [2] * 8


def test_copies_of_rows_with_pitches(device: SimulatedDevice) -> None:
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


def test_memory_is_aligned_counted_and_starts_as_nan(device: SimulatedDevice) -> None:
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
def test_addresses_must_be_aligned_live_and_large_enough(device: SimulatedDevice) -> None:
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
    device: SimulatedDevice, engines: tuple[Path, EngineRecord]
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
def test_bytes_that_nothing_has_written_are_not_read(
    device: SimulatedDevice, engines: tuple[Path, EngineRecord]
) -> None:
    bound = Bound(device, engines, contract.LATE_DECODE)
    bound.context.set_address(contract.THOUGHT, device.alloc(1 << 12, "fresh"))
    bound.context.enqueue()
    with pytest.raises(SeamError, match="thought: byte 0 of fresh is read before anything has written it"):
        settle(device)


# Rule 4.
@pytest.mark.parametrize(("first", "message"), [(-1, "writes rows -1"), (5, "rows from 0 are not written")])
def test_cache_rows_are_written_in_order_and_in_range(
    device: SimulatedDevice, engines: tuple[Path, EngineRecord], first: int, message: str
) -> None:
    bound = Bound(device, engines, contract.LATE_DECODE)
    bound.write({contract.write_indices("late"): first})
    bound.context.enqueue()
    with pytest.raises(SeamError, match=message):
        settle(device)


def test_padding_may_stand_behind_rows_that_the_thinking_layers_lack_and_nobody_goes_on_there(
    device: SimulatedDevice, engines: tuple[Path, EngineRecord]
) -> None:
    bound = Bound(device, engines, contract.THINKING)
    for first in (0, 6, 6, 2, 7):  # padding behind a gap, as often as it likes; a refill from the gap on; padding again
        bound.write({contract.write_indices("thinking"): first})
        bound.context.enqueue()
        settle(device)
    bound.write({contract.write_indices("thinking"): 8})
    bound.context.enqueue()
    with pytest.raises(SeamError, match=r"slot 0 writes from row 8, rows from \d are not written"):
        settle(device)


@pytest.mark.parametrize("whole", [False, True])
def test_a_window_past_the_rows_that_the_run_sees_is_refused(
    device: SimulatedDevice, engines: tuple[Path, EngineRecord], whole: bool
) -> None:
    """TensorRT writes it within the capacity, and attention never sees it; past the capacity nothing is written at all."""
    visible = engines[1].capacity if whole else SIZES["visible_len"]
    bound = Bound(device, engines, contract.THINKING, visible_len=visible)
    bound.write({contract.write_indices("thinking"): 0})
    bound.context.enqueue()
    settle(device)
    bound.write({contract.write_indices("thinking"): visible - 2})
    bound.context.enqueue()
    with pytest.raises(SeamError, match=f"slot 0 writes rows {visible - 2} to {visible} of {visible}"):
        settle(device)


# Rule 5.
def test_a_capture_records_device_work_alone(device: SimulatedDevice, engines: tuple[Path, EngineRecord]) -> None:
    bound = Bound(device, engines, contract.CHOOSE_TOKEN)
    assert bound.context.is_capturable()
    address, staging = written(device, 8), device.alloc_host(8)
    settle(device)
    for touch, message in (
        (lambda: device.upload(address, staging), "an upload within a capture"),
        (lambda: device.download(staging, address), "a download within a capture"),
        (lambda: device.alloc(8, "more"), "allocating more within a capture"),
        (lambda: device.wait(device.mark()), "a mark within a capture"),
        (lambda: device.load_engine(engines[0] / "choose_token.onnx"), "loading an engine within a capture"),
        (bound.new_context, "making a context within a capture"),
        (bound.context.is_capturable, "asking whether a context may be captured within a capture"),
    ):
        with pytest.raises(SeamError, match=message):
            device.capture(touch)  # type: ignore[arg-type]
    assert device.captures == 0


def test_a_replay_runs_the_same_work_on_the_same_addresses(
    device: SimulatedDevice, engines: tuple[Path, EngineRecord]
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
def test_only_page_locked_memory_goes_up_and_down(device: SimulatedDevice) -> None:
    address = written(device, 16)
    with pytest.raises(SeamError, match="not page-locked"):
        device.upload(address, np.zeros(16, np.uint8))
    with pytest.raises(SeamError, match="not page-locked"):
        device.download(device.alloc_host(32)[::2], address)


# Rule 7.
@pytest.mark.parametrize(
    ("profile", "changes", "message"),
    [
        (0, {"batch": 3}, r"input_ids: got shape \(3, 3\), profile 0 takes \(1, 1\) to \(2, 256\)"),
        (0, {"window_len": 257}, r"input_ids: got shape \(1, 257\), profile 0 takes"),
        (1, {"window_len": 4}, r"input_ids: got shape \(1, 4\), profile 1 takes \(1, 1\) to \(2, 3\)"),
        (0, {"visible_len": 321}, r"visible_rows: got shape \(321,\), profile 0 takes \(1,\) to \(320,\)"),
        (2, {}, r"thinking.onnx: got profile 2, it has 2"),
    ],
)
def test_shapes_must_lie_within_the_profile(
    device: SimulatedDevice, engines: tuple[Path, EngineRecord], profile: int, changes: dict[str, int], message: str
) -> None:
    bound = Bound(device, engines, contract.THINKING)
    sizes = {**SIZES, **changes}
    shapes = {info.name: tuple(sizes.get(str(dim), dim) for dim in info.dims) for info in bound.file.inputs}
    with pytest.raises(SeamError, match=message):
        bound.engine.context(profile, shapes, bound.scratch, bound.engine.scratch_bytes)  # type: ignore[arg-type]


def test_activations_are_there_large_enough_and_the_devices_own(
    device: SimulatedDevice, engines: tuple[Path, EngineRecord]
) -> None:
    bound, needed = Bound(device, engines, contract.CHOOSE_TOKEN), SimulatedEngine.scratch_bytes
    for address, count, message in (
        (bound.scratch, needed - 1, f"scratch: got {needed - 1} bytes, expected {needed}"),
        (Address(bound.scratch + ALIGNMENT), needed, "scratch: 1024 bytes from 256 pass the end"),
        (Address(bound.scratch + 8), needed, "scratch: address .* is not a multiple of 256"),
        (Address(0), needed, "scratch: address 0x0 lies in no allocation"),
        (written(SimulatedDevice(), needed), needed, "lies in no allocation"),  # of another device: in another stream
    ):
        with pytest.raises(SeamError, match=message):
            bound.engine.context(0, bound.inputs, address, count)
    bound.context.set_address(contract.IS_FINITE, Address(bound.scratch + ALIGNMENT))
    with pytest.raises(SeamError, match="is_finite: overlaps the activations"):
        bound.context.enqueue()


def test_an_address_that_is_not_aligned_is_refused_when_it_is_set(
    device: SimulatedDevice, engines: tuple[Path, EngineRecord]
) -> None:
    bound = Bound(device, engines, contract.CHOOSE_TOKEN)
    with pytest.raises(SeamError, match=r"token_ids: address .* is not a multiple of 256"):
        bound.context.set_address(contract.TOKEN_IDS, Address(bound.addresses[contract.TOKEN_IDS] + 8))


def test_the_first_run_of_each_context_costs_time_that_is_counted(engines: tuple[Path, EngineRecord]) -> None:
    device = SimulatedDevice(first_run_s=2.5)
    bound = Bound(device, engines, contract.CHOOSE_TOKEN)
    bound.context.enqueue()
    assert device.stalled_s == 0  # the stream has not come to it
    settle(device)
    bound.context.enqueue()
    settle(device)
    assert device.stalled_s == 2.5
    other = bound.new_context()
    for name, address in bound.addresses.items():
        other.set_address(name, address)
    other.enqueue()
    settle(device)
    assert device.stalled_s == 5


def test_shapes_must_fit_the_engine(device: SimulatedDevice, engines: tuple[Path, EngineRecord]) -> None:
    directory, record = engines
    file = record.engine(contract.CHOOSE_TOKEN)
    engine, scratch = device.load_engine(directory / file.file), written(device, 4096)
    with pytest.raises(SeamError, match="logits: got shape"):
        engine.context(0, {contract.LOGITS: (1, 1, 3)}, scratch, 4096)
    with pytest.raises(SeamError, match="scratch: got 0 bytes"):
        engine.context(0, {}, scratch, 0)


def test_room_is_checked_with_numbers() -> None:
    device = SimulatedDevice(memory_bytes=3_000_000_000)
    check_room(device, {"engines": 2_000_000_000}, "use less")
    with pytest.raises(BackendError) as refused:
        check_room(device, {"engines": 2_000_000_000, "caches": 1_500_000_000}, "use less")
    assert str(refused.value) == (
        "simulator: 3.50 GB needed (engines 2.00 GB, caches 1.50 GB), 3.00 of 3.00 GB free; use less"
    )
    assert [aligned(count) for count in (0, 1, 256, 257)] == [256, 256, 256, 512]
