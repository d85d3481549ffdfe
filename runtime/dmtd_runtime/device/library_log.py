"""What TensorRT says: everything to the logger ``dmtd.cuda``, the last error kept for the message of ours that follows it."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("dmtd.cuda")


def make_log(trt: Any) -> Any:
    """An ``ILogger`` of the library with one method more, ``take``."""
    severity = trt.ILogger.Severity
    levels = {severity.WARNING: logging.INFO, severity.INFO: logging.DEBUG, severity.VERBOSE: logging.NOTSET}

    class Log(trt.ILogger):  # type: ignore[misc]  # the base is the library's
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._last = ""

        def log(self, level: Any, message: str) -> None:
            # An error is followed by a second one that only says where it was caught.
            if level in (severity.ERROR, severity.INTERNAL_ERROR) and "catchCudaError" not in message:
                self._last = " ".join(message.split())[:300]
            logger.log(levels.get(level, logging.INFO), "%s", message)

        def take(self) -> str:
            """The last error since the last call."""
            last, self._last = self._last, ""
            return last or "the library gave no reason"

    return Log()
