"""Bytes of a file to a device, through two page-locked buffers: one is filled while the other is read."""

from __future__ import annotations

from typing import Protocol

from dmtd_runtime.device.base import Address, Array, Mark

UPLOAD_BYTES = 16 << 20


class UploadDevice(Protocol):
    """The part of :class:`dmtd_runtime.device.base.Device` that uploading needs."""

    def alloc_host(self, num_bytes: int) -> Array: ...

    def upload(self, target: Address, source: Array) -> None: ...

    def mark(self) -> Mark: ...

    def wait(self, mark: Mark) -> None: ...


class Uploader:
    """Uploads arrays of any size; keeps its two buffers for the next one."""

    def __init__(self, device: UploadDevice) -> None:
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
