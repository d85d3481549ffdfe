"""The options of ``BenchOptions``: what is measured, and how often."""

from __future__ import annotations

from typing import Annotated

from dmtd_runtime.bench.measure import BenchOptions
from dmtd_runtime.cli.options.groups import Group, option
from dmtd_runtime.errors import RequestError


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise RequestError(
            f"got {text!r}, expected whole numbers with commas, such as 1,2,4", param="batches"
        ) from None


BenchGroup = Annotated[
    BenchOptions,
    Group(
        {
            "batches": option("Sequences at a time: one number, or several with commas, such as 1,2,4.", "--batch"),
            "prompt_len": option("Tokens of each prompt."),
            "max_tokens": option("New tokens of each sequence."),
            "repeats": option("Measured runs of each mode."),
            "warmup": option("Runs of each mode before those. On a GPU at least 1."),
            "seed": option("Seed of the random prompts."),
            "whole_model": option(
                "Also measure plain decoding over one graph of the whole model. By default off.", "--whole-model"
            ),
        },
        parsers={"batches": _sizes},
    ),
]
