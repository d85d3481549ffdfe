"""Host memory between the backend and the stream: page-locked, and never written while the device may still read it."""

from __future__ import annotations

from dmtd_runtime.device.base import Array, Device, Mark


class Staging:
    """Page-locked buffers used in turn; one is given out once the device has passed its last use."""

    def __init__(self, device: Device, num_bytes: int, count: int) -> None:
        self._device = device
        self._buffers = [device.alloc_host(num_bytes) for _ in range(count)]
        self._marks: list[Mark | None] = [None] * count
        self._next = 0

    def take(self) -> Array:
        """The next buffer, which the device uses no more."""
        number = self._next
        if (mark := self._marks[number]) is not None:
            self._device.wait(mark)
        return self._buffers[number]

    def used(self) -> Mark:
        """Say that the device uses the buffer taken last, up to here."""
        mark = self._marks[self._next] = self._device.mark()
        self._next = (self._next + 1) % len(self._buffers)
        return mark
