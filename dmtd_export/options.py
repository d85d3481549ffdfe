"""What `dmtd export` can be told. The command line takes its defaults from here, so that CLI and API cannot differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dmtd_models.config.model import MAX_CYCLE_LENGTH, SplitOptions
from dmtd_runtime.bundle import contract

Target = Literal["onnxruntime", "tensorrt", "all"]
Dtype = Literal["float32", "float16", "bfloat16"]

# The longest window of a graph: KV capacity and rotary tables leave this much room above the model length.
MAX_WINDOW = contract.MIN_WINDOW
assert MAX_WINDOW >= MAX_CYCLE_LENGTH, "a refill fits into a window"
MAX_NUM_SEQS_LIMIT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    ``generation_config``: a file in the place of the checkpoint's generation_config.json, or ``none`` for its token ids alone.
    """

    split: SplitOptions = field(default_factory=SplitOptions)
    target: Target = "all"
    dtype: Dtype = "float32"
    max_model_len: int | None = None  # the model's own by default
    max_num_seqs: int = 8
    generation_config: str | None = None
    verify: bool = True
