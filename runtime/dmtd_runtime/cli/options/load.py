"""The options of ``LoadOptions``: what is brought to a worker, and when."""

from __future__ import annotations

from typing import Annotated

from dmtd_runtime.bench.load import LoadOptions
from dmtd_runtime.cli.options.groups import Group, option

PANEL = "Serving load"
LOAD = Group(
    {
        "concurrency": option(
            "So many sequences under way at all times (a closed loop), instead of a rate.", panel=PANEL, min=1
        ),
        "num_prompts": option(
            "Sequences of each load; by default four for each slot, or all of the file.", panel=PANEL, min=1
        ),
        "range_ratio": option(
            "Lengths are uniform between 1 - R and 1 + R times --prompt-len and --max-tokens.", panel=PANEL, metavar="R"
        ),
        "prefix_len": option("Tokens that all prompts begin with, before --prompt-len of their own.", panel=PANEL),
        "long_prompts": option(
            "So many long prompts besides, read one after another while others decode.", panel=PANEL
        ),
        "long_prompt_len": option("Tokens of a long prompt.", panel=PANEL),
        "dataset": option(
            'Prompts and lengths of a file: JSON lines like ShareGPT\'s, or {"prompt", "max_tokens"}.',
            panel=PANEL,
            metavar="FILE.jsonl",
        ),
    }
)
Load = Annotated[LoadOptions, LOAD]
