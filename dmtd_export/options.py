"""What `dmtd export` can be told. The command line takes its defaults from here, so that CLI and API cannot differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dmtd_export.errors import ExportError
from dmtd_models.config.model import MAX_CYCLE_LENGTH, SplitOptions
from dmtd_runtime.bundle import contract

Target = Literal["onnxruntime", "tensorrt", "all"]
Dtype = Literal["float32", "float16", "bfloat16"]
KvDtype = Literal["float32", "float16", "bfloat16", "int8"]
WeightGroup = Literal["thinking", "late", "lm_head", "embedding"]
GROUPS: tuple[WeightGroup, ...] = ("thinking", "late", "lm_head", "embedding")
WeightFormat = Literal["float", "keep", "int8", "int8-channel", "int4", "int4-symmetric", "fp8"]
# Rounded over a calibration text, if one is given; the last one needs it.
CALIBRATED_FORMATS: tuple[WeightFormat, ...] = ("int4", "int4-symmetric", "int8-channel")
# Groups that are in int8 under int4, which costs most there, and under int8-channel, for rows are looked up in blocks.
IN_EIGHT_BITS: tuple[WeightGroup, ...] = ("lm_head", "embedding")

# The longest window of a graph: KV capacity and rotary tables leave this much room above the model length.
MAX_WINDOW = contract.MIN_WINDOW
assert MAX_WINDOW >= MAX_CYCLE_LENGTH, "a refill fits into a window"
MAX_NUM_SEQS_LIMIT = 64
CALIBRATION_TOKENS = range(256, 2**20 + 1)  # fewer say too little of a model


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOptions:
    """The formats that weights are stored in: a group's own, or ``weights``.

    ``int4`` means ``int8`` for lm_head and the embedding, unless it is given as their own; ``int4-symmetric``, which has a
    scale a block and no minimum, is faster and loses more. ``int8-channel``, a scale for each output and a factor for each input,
    is not for the embedding; ``fp8``, with a scale for each output, is for engines. ``keep``: as the checkpoint has them; so it
    is by default where the checkpoint is quantised, and ``float`` elsewhere.
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
        if own is None and self.weights in ("int4", "int8-channel") and group in IN_EIGHT_BITS:
            return "int8"
        return own or self.weights or "float"

    @property
    def over_text(self) -> bool:
        """Whether a calibration text bears on any group: not on an embedding, but where it is tied to lm_head."""
        return any(self.format_of(group) in CALIBRATED_FORMATS for group in GROUPS if group != "embedding")

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

    ``kv``: the type of caches, by default ``dtype``; int8 has a scale for each channel, measured over ``calibration``, which are
    files of text. Matrices of 4 bits are rounded over that text, too.
    ``generation_config``: a file in the place of the checkpoint's generation_config.json, or ``none`` for its token ids alone.
    """

    split: SplitOptions = field(default_factory=SplitOptions)
    formats: WeightOptions = field(default_factory=WeightOptions)
    # all; with quantised weights or int8 caches onnxruntime, whose own graphs alone take them; with fp8 tensorrt
    target: Target | None = None
    dtype: Dtype = "float32"
    kv: KvDtype | None = None
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 4096  # of all files together, at most
    max_model_len: int | None = None  # the model's own by default
    max_num_seqs: int = 8
    generation_config: str | None = None
    verify: bool = True

    @property
    def graphs_for(self) -> Target:
        """The target, or what takes its place where none is given."""
        if self.target is not None:
            return self.target
        if self.formats.has_float8:
            return "tensorrt"
        return "onnxruntime" if self.formats.quantises or self.kv == "int8" else "all"

    @property
    def kv_dtype(self) -> KvDtype:
        """The type of caches."""
        return self.kv or self.dtype


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
    check_formats(options)
    check_channels(options)
    check_caches(options)
    check_calibration(options)


def check_channels(options: ExportOptions) -> None:
    """Refuse int8-channel without its text, and where it cannot be.

    Raises:
        ExportError: with the option.
    """
    formats = options.formats
    groups: list[WeightGroup] = [group for group in GROUPS if formats.format_of(group) == "int8-channel"]
    if not groups:
        return
    own = next((f"weights_{group}" for group in groups if getattr(formats, f"weights_{group}")), "weights")
    if "embedding" in groups:
        raise ExportError(
            "got int8-channel, expected another format: rows of the embedding are looked up in blocks; give int8, and "
            "--weights-lm-head int8 where lm_head is tied to it",
            param="weights_embedding",
        )
    if options.graphs_for != "onnxruntime":
        raise ExportError(
            f"got int8-channel with {_target_in_words(options)}, expected onnxruntime: products of whole numbers are ONNX "
            "Runtime's own; leave it out, or give int8",
            param=own,
        )
    if options.dtype != "float32":
        raise ExportError(
            f"got int8-channel with --dtype {options.dtype}, expected float32: products of whole numbers run on the CPU alone; "
            "leave one of them out",
            param=own,
        )
    if not options.calibration:
        raise ExportError(
            "got int8-channel and no text to measure inputs over; give one: --calibration FILE, plain text or .jsonl",
            param=own,
        )


def check_caches(options: ExportOptions) -> None:
    """Refuse a type of caches that no graph has, or that lacks its text.

    Raises:
        ExportError: with the option.
    """
    if options.kv_dtype not in (options.dtype, "int8"):
        slow = ": ONNX Runtime would cast a float16 cache whole in every step" if options.kv == "float16" else ""
        raise ExportError(
            f"got {options.kv}, expected int8 or {options.dtype}, the bundle's --dtype{slow}; leave it out, or give --kv int8",
            param="kv",
        )
    if options.kv == "int8" and options.dtype != "float32":
        raise ExportError(
            f"got int8 with --dtype {options.dtype}, expected float32: ONNX Runtime's attention over int8 caches was tried in "
            "nothing else; leave one of them out",
            param="kv",
        )
    if options.kv == "int8" and options.graphs_for != "onnxruntime":
        raise ExportError(
            f"got int8 with {_target_in_words(options)}, expected onnxruntime: standard graphs and engines have caches of the "
            "model's type; leave one of them out",
            param="kv",
        )
    if options.kv == "int8" and not options.calibration:
        raise ExportError(
            "got int8 and no text to measure scales over; give one: --calibration FILE, plain text or .jsonl",
            param="kv",
        )


def check_calibration(options: ExportOptions) -> None:
    """Refuse a text without a use, or too little or too much of it.

    Raises:
        ExportError: with the option.
    """
    if options.calibration and options.kv != "int8" and not options.formats.over_text:
        raise ExportError(
            "has no use here: got no layers or lm_head in 4 bits or int8-channel and no --kv int8; leave it out, or "
            "give one of them",
            param="calibration",
        )
    tokens = options.calibration_tokens
    if tokens not in CALIBRATION_TOKENS:
        least, most = CALIBRATION_TOKENS.start, CALIBRATION_TOKENS.stop - 1
        raise ExportError(f"got {tokens}, expected {least} to {most}", param="calibration_tokens")
    if not options.calibration and tokens != ExportOptions().calibration_tokens:
        raise ExportError(
            f"got {tokens} and no text; give one with --calibration FILE, or leave it out", param="calibration_tokens"
        )


def check_formats(options: ExportOptions) -> None:
    """Refuse a type that graphs over quantised weights do not have.

    Raises:
        ExportError: with the option.
    """
    if options.formats.has_float8 and options.graphs_for != "tensorrt":
        raise ExportError(
            f"got {options.graphs_for} with weights in fp8, expected tensorrt: ONNX Runtime's own products take none; export "
            "with --target tensorrt, or --weights int8",
            param="target",
        )


def _target_in_words(options: ExportOptions) -> str:
    """The target, and what it follows from where it was not given."""
    return f"--target {options.graphs_for}{'' if options.target else ', which fp8 implies'}"
