"""Runtime: generates text from a bundle through cycle and refill. No torch, no onnx.

    from dmtd_runtime import LLM, SamplingParams

Names are loaded when first used: importing the package loads no ONNX Runtime.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from dmtd_runtime.errors import AbortedError, BackendError, BundleError, DmtdError, QueueFullError, RequestError
from dmtd_runtime.version import __version__

if TYPE_CHECKING:
    from dmtd_runtime.async_llm import AsyncLLM
    from dmtd_runtime.llm import LLM
    from dmtd_runtime.sampling.params import SamplingParams
    from dmtd_runtime.sampling.structured import StructuredOutputs
    from dmtd_runtime.serving.counts import Counts
    from dmtd_runtime.serving.outputs import CompletionOutput, Delta, RequestOutput

logging.getLogger("dmtd").addHandler(logging.NullHandler())

__all__ = [
    "LLM",
    "AbortedError",
    "AsyncLLM",
    "BackendError",
    "BundleError",
    "CompletionOutput",
    "Counts",
    "Delta",
    "DmtdError",
    "QueueFullError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
]

_HOMES = {
    "LLM": "dmtd_runtime.llm",
    "AsyncLLM": "dmtd_runtime.async_llm",
    "Counts": "dmtd_runtime.serving.counts",
    "CompletionOutput": "dmtd_runtime.serving.outputs",
    "Delta": "dmtd_runtime.serving.outputs",
    "RequestOutput": "dmtd_runtime.serving.outputs",
    "SamplingParams": "dmtd_runtime.sampling.params",
    "StructuredOutputs": "dmtd_runtime.sampling.structured",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
