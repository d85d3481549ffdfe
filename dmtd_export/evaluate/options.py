"""What `dmtd evaluate` can be told. The command line takes its defaults from here, so that CLI and API cannot differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_models.config.model import SplitOptions

Device = Literal["cpu", "cuda"]
ScoreDtype = Literal["float32", "bfloat16"]

MIN_SCORED = 8  # rows behind the context that a window of text must have


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How to open a subject. ``split`` applies to checkpoints; ``dtype`` is a checkpoint's in memory, a bundle has its own."""

    split: SplitOptions = field(default_factory=SplitOptions)
    adapter: Path | None = None  # of a checkpoint
    device: Device = "cpu"
    dtype: ScoreDtype = "float32"
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """``tasks`` by the harness's names; ``include`` a directory of further task files."""

    tasks: tuple[str, ...] = ()
    include: Path | None = None
    chat: bool = False  # render prompts with the model's chat template


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What to measure and how."""

    texts: tuple[str, ...] = ()  # files, or directories of data
    tasks: tuple[str, ...] = ()  # files of items
    max_tokens: int = 20_000  # of text, all texts together
    window_len: int = 512
    context_len: int = 32  # tokens of a window that are fed and not scored
    limit: int = 100  # items of a task
    prefixes: int = 64  # run lengths: how many of each kind
    max_run: int = 32  # run lengths: how far
    resamples: int = 1000
    seed: int = 0
    fluency: bool = False  # texts on the everyday prompts
    compare_conventions: bool = False
    offsets: bool = False  # texts with the first head at every place of a cycle
    run_unsafe_code: bool = False  # tasks of the harness like HumanEval and MBPP execute what the models write
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    open: OpenOptions = field(default_factory=OpenOptions)
    base_open: OpenOptions = field(default_factory=OpenOptions)

    def __post_init__(self) -> None:
        lowest = {
            "max_tokens": 1,
            "limit": 1,
            "prefixes": 0,
            "max_run": 1,
            "resamples": 100,
            "context_len": 1,
            "seed": 0,
        }
        for name, least in lowest.items():
            if (value := getattr(self, name)) < least:
                raise EvaluateError(f"got {value}, expected {least} or more", param=name)
        harness = self.harness
        useless = {
            "lm_eval_include": (harness.include is not None and not harness.tasks, "--lm-eval"),
            "lm_eval_chat": (harness.chat and not harness.tasks, "--lm-eval"),
            "run_unsafe_code": (self.run_unsafe_code and not harness.tasks, "--lm-eval"),
        }
        for name, (given, missing) in useless.items():
            if given:
                raise EvaluateError(f"has no effect without {missing}; leave it out, or give that", param=name)
        if self.window_len < self.context_len + 2 * MIN_SCORED:
            raise EvaluateError(
                f"got {self.window_len}, expected {self.context_len + 2 * MIN_SCORED} or more: the context "
                f"of {self.context_len} tokens is not scored",
                param="window_len",
            )
