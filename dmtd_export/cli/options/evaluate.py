"""The options of ``EvaluateOptions`` and its parts: what is measured, how much, and how models are opened."""

from __future__ import annotations

from typing import Annotated

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.options import EvaluateOptions, HarnessOptions, OpenOptions
from dmtd_runtime.cli.options.groups import Group, option, threads_option

_WHAT, _HOW, _HARNESS = "What is measured", "How much, and where", "Tasks of lm-eval"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _confidences(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.replace(",", " ").split())
    except ValueError:
        raise EvaluateError(f"got {text[:60]!r}, expected numbers such as 0,0.3,0.5", param="min_confidence") from None


EvaluateGroup = Annotated[
    EvaluateOptions,
    Group(
        {
            "texts": option(
                "Held-out text: a text file, or data as `dmtd finetune --data` takes it. May be given again.",
                "--text",
                panel=_WHAT,
            ),
            "tasks": option("A file of items of your own (.jsonl). May be given again.", "--task", panel=_WHAT),
            "fluency": option(
                "Let model and base answer twenty everyday prompts, and measure the answers' perplexity under the base.",
                "--fluency",
                panel=_WHAT,
            ),
            "min_confidence": option(
                "The dial from quality to speed on the same prompts: confidences with commas between, such as 0,0.3,0.5,0.7.",
                panel=_WHAT,
            ),
            "compare_conventions": option(
                "Measure --text under every legal convention, and name the best. For checkpoints.",
                "--compare-conventions",
                panel=_WHAT,
            ),
            "offsets": option(
                "Measure --text with the first head at every place of a cycle.", "--offsets", panel=_WHAT
            ),
            "max_tokens": option("Tokens of text, of all --text together, in whole windows, at least one.", panel=_HOW),
            "window_len": option("Tokens of a window of text, which is scored as one sequence.", panel=_HOW),
            "context_len": option("Tokens at a window's start that are the prompt, and are not scored.", panel=_HOW),
            "limit": option("Items of each task.", panel=_HOW),
            "prefixes": option("Beginnings that are continued, to measure run lengths. 0: none.", panel=_HOW),
            "max_run": option("Tokens at which a run length is cut off.", panel=_HOW),
            "seed": option("Seed of everything that is drawn: windows, prefixes, items, intervals.", panel=_HOW),
        },
        parsers={"min_confidence": _confidences},
    ),
]
OpenGroup = Annotated[
    OpenOptions,
    Group(
        {
            "adapter": option(
                "A directory that `dmtd finetune` made of MODEL. Unless --base names another, the base is then MODEL without it. "
                "By default none."
            ),
            "dtype": option("Type of a checkpoint in memory. A bundle has its own.", panel=_HOW),
            "device": option("Where to compute.", panel=_HOW),
            "threads": threads_option(_HOW),
        }
    ),
]
HarnessGroup = Annotated[
    HarnessOptions,
    Group(
        {
            "lm_eval": option(
                "Tasks by their names in lm-eval, with commas between: arc_easy,gsm8k. By default none.", panel=_HARNESS
            ),
            "lm_eval_include": option("A directory of further task files. By default none.", panel=_HARNESS),
            "lm_eval_chat": option(
                "Render prompts with the model's chat template. By default off.", "--lm-eval-chat", panel=_HARNESS
            ),
            "run_unsafe_code": option(
                "Let tasks like HumanEval and MBPP run the code that models write, on this machine. By default off.",
                "--run-unsafe-code",
                panel=_HARNESS,
            ),
        },
        parsers={"lm_eval": _names},
    ),
]
