"""One line a record on stderr, for people or as JSON; what a record carries beside its message goes into the JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator

from dmtd_runtime.server.options import LogFormat

_FACTS = ("request_id", "method", "path", "status", "duration_ms", "client")


class JsonLines(logging.Formatter):
    """``{"time", "level", "logger", "message", ...}``."""

    def format(self, record: logging.LogRecord) -> str:
        """One object."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name}
        told["message"] = record.getMessage()
        told |= {name: getattr(record, name) for name in _FACTS if hasattr(record, name)}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


class TextLines(logging.Formatter):
    """Time, level, request, message."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback of a bug."""
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = f" [{record.request_id}]" if hasattr(record, "request_id") else ""
        line = f"{stamp} {record.levelname.lower()}{name} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


@contextlib.contextmanager
def logs_to_stderr(form: LogFormat) -> Iterator[None]:
    """Show the product's log and uvicorn's warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    levels = {logging.getLogger("dmtd"): logging.INFO, logging.getLogger("uvicorn"): logging.WARNING}
    before = [(logger, logger.level, logger.propagate) for logger in levels]
    for logger, level in levels.items():
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
