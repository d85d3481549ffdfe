"""Kernels that TensorRT-RTX compiled when a context first ran, kept under the user's cache directory for the next time.

One file for each engine file, GPU and library version. A cache that cannot be read or written costs a compilation, no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from dmtd_runtime.bundle.opening import cache_directory

logger = logging.getLogger("dmtd.cuda")


class KernelCache:
    """An ``IRuntimeCache`` of the library and its file."""

    def __init__(self, cache: Any, engine: Path, machine: str) -> None:
        """Read the file, if it is there.

        Args:
            cache: the library's.
            engine: told apart by name, size and time, which moving its directory keeps.
            machine: names GPU and library version.
        """
        stat = engine.stat()
        key = f"{engine.name} {stat.st_size} {stat.st_mtime_ns} {machine}"
        self._cache, self._saved = cache, b""
        self._path: Path | None = None
        with contextlib.suppress(OSError, RuntimeError):  # no home directory
            self._path = cache_directory() / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()}.bin"
            self._saved = self._path.read_bytes()
        if self._saved and not cache.deserialize(self._saved):
            logger.info("%s: not a cache of this library, kernels are compiled again", self._path)
            self._saved = b""

    def save(self) -> None:
        """Write what was compiled since, if anything."""
        content = bytes(self._cache.serialize() or b"")
        if self._path is None or not content or content == self._saved:
            return
        partial = self._path.with_suffix(f".{os.getpid()}.partial")
        with contextlib.suppress(OSError):
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(self._path)
            self._saved = content
