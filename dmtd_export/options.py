"""What `dmtd export` can be told. The command line takes its defaults from here, so that CLI and API cannot differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dmtd_export.errors import ExportError
from dmtd_models.config.model import MAX_CYCLE_LENGTH, SplitOptions
from dmtd_runtime.bundle import contract

Target = Literal["onnxruntime", "tensorrt", "all"]
Dtype = Literal["float32", "float16", "bfloat16"]
WeightGroup = Literal["thinking", "late", "lm_head", "embedding"]
GROUPS: tuple[WeightGroup, ...] = ("thinking", "late", "lm_head", "embedding")
WeightFormat = Literal["float", "keep", "int8", "int4", "int4-symmetric", "fp8"]
IN_EIGHT_BITS: tuple[WeightGroup, ...] = ("lm_head", "embedding")  # under int4, which costs most there

# The longest window of a graph: KV capacity and rotary tables leave this much room above the model length.
MAX_WINDOW = contract.MIN_WINDOW
assert MAX_WINDOW >= MAX_CYCLE_LENGTH, "a refill fits into a window"
MAX_NUM_SEQS_LIMIT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOptions:
    """The formats that weights are stored in: a group's own, or ``weights``.

    ``int4`` means ``int8`` for lm_head and the embedding, unless it is given as their own; ``int4-symmetric``, which has a
    scale a block and no minimum, is faster and loses more; ``fp8``, with a scale for each output, is for engines. ``keep``: as
    the checkpoint has them; so it is by default where the checkpoint is quantised, and ``float`` elsewhere.
    ``weights_block``: inputs that share a scale.
    """

    weights: WeightFormat | None = None
    weights_thinking: WeightFormat | None = None
    weights_late: WeightFormat | None = None
    weights_lm_head: WeightFormat | None = None
    weights_embedding: WeightFormat | None = None
    weights_block: int = 32

    def format_of(self, group: WeightGroup) -> WeightFormat:
        """The format of a group: E and D are late."""
        own: WeightFormat | None = getattr(self, f"weights_{group}")
        if own is None and self.weights == "int4" and group in IN_EIGHT_BITS:
            return "int8"
        return own or self.weights or "float"

    @property
    def has_float8(self) -> bool:
        """Whether any group is stored as floats of 8 bits."""
        return any(self.format_of(group) == "fp8" for group in GROUPS)

    @property
    def quantises(self) -> bool:
        """Whether any group is not stored as floats."""
        return any(self.format_of(group) != "float" for group in GROUPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    ``generation_config``: a file in the place of the checkpoint's generation_config.json, or ``none`` for its token ids alone.
    """

    split: SplitOptions = field(default_factory=SplitOptions)
    formats: WeightOptions = field(default_factory=WeightOptions)
    # all; with quantised weights onnxruntime, whose own graphs alone multiply in blocks; with fp8 tensorrt
    target: Target | None = None
    dtype: Dtype = "float32"
    max_model_len: int | None = None  # the model's own by default
    max_num_seqs: int = 8
    generation_config: str | None = None
    verify: bool = True

    @property
    def graphs_for(self) -> Target:
        """The target, or what takes its place where none is given."""
        return self.target or (
            "tensorrt" if self.formats.has_float8 else "onnxruntime" if self.formats.quantises else "all"
        )


def check_options(options: ExportOptions) -> None:
    """Refuse what no checkpoint makes good, before anything is loaded or read.

    Raises:
        ExportError: with the option.
    """
    from dmtd_models.checkpoints.blocks import BLOCK_SIZES  # numpy, which asking for help does without

    if not 1 <= options.max_num_seqs <= MAX_NUM_SEQS_LIMIT:
        raise ExportError(f"got {options.max_num_seqs}, expected 1 to {MAX_NUM_SEQS_LIMIT}", param="max_num_seqs")
    block, formats = options.formats.weights_block, [options.formats.format_of(group) for group in GROUPS]
    if block not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ExportError(f"got {block}, expected one of {sizes}; choose one", param="weights_block")
    if block != WeightOptions().weights_block and not {"int4", "int4-symmetric", "int8"} & {*formats}:
        raise ExportError(
            f"got {block}, and no weights are int4 or int8, which alone are rounded in blocks; leave it out",
            param="weights_block",
        )
    if options.formats.has_float8 and options.graphs_for != "tensorrt":
        raise ExportError(
            f"got {options.graphs_for} with weights in fp8, expected tensorrt: ONNX Runtime's own products take none; export "
            "with --target tensorrt, or --weights int8",
            param="target",
        )
