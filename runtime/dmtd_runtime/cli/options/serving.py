"""The options of ``ServingOptions``: how sequences share a worker."""

from __future__ import annotations

from typing import Annotated

from dmtd_runtime.cli.options.groups import Group, option
from dmtd_runtime.serving.options import ServingOptions

_PANEL = "Scheduling"
SERVING = Group(
    {
        "max_num_batched_tokens": option(
            "Rows of a full pass, cycle heads and prompts together; by default what the backend takes.",
            panel=_PANEL,
            min=1,
        ),
        "long_prefill_token_threshold": option(
            "Rows of prompts in a pass that running sequences wait for; by default the scheduler's own.",
            panel=_PANEL,
            min=1,
        ),
        "max_num_partial_prefills": option("Prompts that are read in parts at a time.", panel=_PANEL, min=1),
        "max_num_queued_reqs": option("Sequences that may wait; more are refused.", panel=_PANEL, min=1),
        "max_num_queued_tokens": option("Prompt tokens that may wait; more are refused.", panel=_PANEL, min=1),
        "prefix_cache_bytes": option(
            "Host memory for keys and values of earlier prompts; 0 keeps none.", panel=_PANEL, min=0
        ),
    }
)
OnePrompt = Annotated[ServingOptions, SERVING.only("max_num_batched_tokens")]
Turns = Annotated[ServingOptions, SERVING.only("max_num_batched_tokens", "prefix_cache_bytes")]
"""What matters to one sequence after another: nobody waits."""
_SHARED = ("max_num_batched_tokens", "long_prefill_token_threshold", "max_num_partial_prefills", "prefix_cache_bytes")
Many = Annotated[ServingOptions, SERVING.only(*_SHARED)]
"""What matters where many sequences come, and none is refused."""
