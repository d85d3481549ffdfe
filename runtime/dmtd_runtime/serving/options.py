"""How a worker shares its backend between sequences: ``ServingOptions``, one field an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from dmtd_runtime.errors import RequestError

DEFAULT_PREFIX_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """What bounds a pass, a queue and the prefix cache.

    ``max_num_batched_tokens``: rows of a full pass, cycle heads and prompts together; prompts get what heads leave, at least
    one row each. ``long_prefill_token_threshold``: rows of prompts in a pass that running sequences wait for. Both None: what
    the backend takes, and the scheduler's own default. ``max_num_partial_prefills``: prompts read at a time, unless more of them
    fit whole into one pass.
    ``max_num_queued_reqs`` sequences may wait with ``max_num_queued_tokens`` prompt tokens; None: no bound.
    ``prefix_cache_bytes``: host memory for keys and values of earlier prompts; 0 keeps none.
    """

    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int | None = None
    max_num_partial_prefills: int = 2
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES

    def __post_init__(self) -> None:
        least = {"prefix_cache_bytes": 0}
        for name in self.__slots__:
            value = getattr(self, name)
            if value is None and name != "prefix_cache_bytes" and name != "max_num_partial_prefills":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise RequestError(f"got {value!r}, expected a whole number", param=name)
            if value < least.get(name, 1):
                raise RequestError(f"got {value}, expected at least {least.get(name, 1)}", param=name)
