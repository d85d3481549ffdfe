"""What `dmtd evaluate` can be told. The command line takes its defaults from here, so that CLI and API cannot differ."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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

    @property
    def of_base(self) -> OpenOptions:
        """How the plain base is opened: it has no adapter, and its split does not matter."""
        return replace(self, split=SplitOptions(), adapter=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """Tasks of EleutherAI's lm-eval harness."""

    lm_eval: tuple[str, ...] = ()  # names of tasks or groups
    lm_eval_include: Path | None = None  # a directory of further task files
    lm_eval_chat: bool = False  # render prompts with the model's chat template
    run_unsafe_code: bool = False  # tasks like HumanEval and MBPP execute what the models write

    def __post_init__(self) -> None:
        for name in ("lm_eval_include", "lm_eval_chat", "run_unsafe_code"):
            if getattr(self, name) and not self.lm_eval:
                raise EvaluateError("has no effect without --lm-eval; leave it out, or give that", param=name)


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
    min_confidence: tuple[float, ...] = ()  # the dial from quality to speed at these, on the everyday prompts
    compare_conventions: bool = False
    offsets: bool = False  # texts with the first head at every place of a cycle
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    open: OpenOptions = field(default_factory=OpenOptions)

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
        for confidence in self.min_confidence:
            if not 0 <= confidence <= 1:
                raise EvaluateError(f"got {confidence}, expected numbers from 0 to 1", param="min_confidence")
        if self.window_len < self.context_len + 2 * MIN_SCORED:
            raise EvaluateError(
                f"got {self.window_len}, expected {self.context_len + 2 * MIN_SCORED} or more: the context "
                f"of {self.context_len} tokens is not scored",
                param="window_len",
            )
