"""Bytes of a file to a device, through two page-locked buffers: one is filled while the other is read."""

from __future__ import annotations

from dmtd_runtime.device.base import Address, Array, DeviceMemory

UPLOAD_BYTES = 16 << 20


class Uploader:
    """Uploads arrays of any size; keeps its two buffers for the next one."""

    def __init__(self, device: DeviceMemory) -> None:
        self._device = device
        self._staging = [device.alloc_host(UPLOAD_BYTES) for _ in range(2)]

    def upload(self, target: Address, data: Array) -> None:
        """Copy ``data``, uint8, to ``target`` and wait for it."""
        marks = [self._device.mark()] * 2
        for number, first in enumerate(range(0, len(data), UPLOAD_BYTES)):
            part, staging = data[first : first + UPLOAD_BYTES], self._staging[number % 2]
            self._device.wait(marks[number % 2])
            staging[: len(part)] = part
            self._device.upload(Address(target + first), staging[: len(part)])
            marks[number % 2] = self._device.mark()
        self._device.wait(self._device.mark())
