"""What is run over the stand-ins: bundles, dialects, batches; and within each case graphs on and off, DMTD and plain, choices.

Kernels do nothing, so the tokens mean nothing: the harness feeds token 0 wherever the device was to choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint

MAX_BATCH = 4
# Ragged prompts, two more than there are slots: of four, slots fall idle one by one, and then a batch of two follows.
PROMPT_LENS = (3, 40, 1, 17, 9, 5)
LONG_PROMPT_LEN = 300  # more than a window: in chunks, the first of which gives no token
MAX_TOKENS = (9, 4, 12, 6, 7, 10)
EXTRA_PROMPTS = 2
# The first run of a shape allocates piece by piece, the second what ONNX Runtime has learnt from it; then it is warm.
WARM_UPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A tiny checkpoint and its split."""

    family: str
    dtype: Literal["float32", "float16", "bfloat16"]
    encoding_layers: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # of write_tiny_checkpoint
    formats: WeightOptions = field(default_factory=WeightOptions)

    @property
    def name(self) -> str:
        formats = f"-{self.formats.weights}" if self.formats.weights else ""
        return f"{self.family}-{self.dtype}{formats}"

    def export(self, directory: Path) -> Path:
        bundle = directory / "bundle"
        if not bundle.exists():
            checkpoint = directory / "checkpoint"
            sizes = {"layers": 5, **self.sizes}
            write_tiny_checkpoint(checkpoint, family=self.family, dtype=self.dtype, **sizes)
            options = ExportOptions(
                split=SplitOptions(encoding_layers=self.encoding_layers, decoding_layers=2, cycle_length=3),
                dtype=self.dtype,
                formats=self.formats,
                target="all",
                max_num_seqs=MAX_BATCH,
                verify=False,
            )
            export_bundle(checkpoint, bundle, options)
        return bundle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One bundle opened one way."""

    model: Model
    dialect: Literal["onnxruntime", "standard"]
    full_pass: Literal["staged", "fused"]
    slots: int
    judges_memory: bool = False  # weights outweigh what a session needs whatever the model's size

    @property
    def model_name(self) -> str:
        return self.model.name + ("-large" if self.judges_memory else "")

    @property
    def name(self) -> str:
        return f"{self.model_name}-{self.dialect}-{self.full_pass}-{self.slots}"

    @property
    def modes(self) -> tuple[tuple[bool, bool], ...]:
        """How the bundle is opened in turn: (cuda_graphs, plain)."""
        return ((True, False), (False, False)) if self.judges_memory else tuple(product((True, False), (False, True)))

    @property
    def prompt_lens(self) -> tuple[int, ...]:
        lens = PROMPT_LENS[: self.slots + EXTRA_PROMPTS]
        return (*lens[:-1], LONG_PROMPT_LEN) if self.judges_memory else lens

    def llm_options(self) -> dict[str, Any]:
        return {"device": "cuda", "dialect": self.dialect, "full_pass": self.full_pass, "max_num_seqs": self.slots}


LLAMA = Model(family="llama", dtype="float16")
QWEN = Model(family="qwen3", dtype="bfloat16", encoding_layers=1)
FLOAT32 = Model(family="llama", dtype="float32")  # its attention node on CUDA takes half types only: standard dialect
# Quantised weights: with minimums, biases and a tied embedding, all in 4 bits; in 8 bits, an untied lm_head in 4; a scale alone,
# in the largest and in the smallest block. The provider's DequantizeLinear takes blocks of 4 bits alone, and no bfloat16.
INT4 = Model(
    family="qwen2",
    dtype="float16",
    sizes={"tie": True},
    formats=WeightOptions(weights="int4", weights_lm_head="int4", weights_embedding="int4"),
)
INT8 = replace(QWEN, formats=WeightOptions(weights="int8", weights_lm_head="int4"))
SYMMETRIC = replace(
    QWEN,
    encoding_layers=0,
    sizes={"hidden_size": 128, "intermediate_size": 128, "heads": 8},
    formats=WeightOptions(weights="int4-symmetric", weights_block=128),
)
SMALL_BLOCKS = replace(LLAMA, formats=WeightOptions(weights="int8", weights_block=16))
# 80 MB, a twentieth of it in each of embedding and head.
LARGE = replace(
    LLAMA,
    sizes={
        "layers": 12,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_positions": 1024,
    },
)
LARGE_INT4 = replace(LARGE, dtype="bfloat16", formats=WeightOptions(weights="int4"))
IN_BLOCKS = (INT4, INT8, SYMMETRIC, SMALL_BLOCKS, replace(INT4, dtype="bfloat16"))

CASES = (
    *(
        Case(model=model, dialect=dialect, full_pass=full_pass, slots=slots)
        for model in (LLAMA, QWEN)
        for dialect in ("onnxruntime", "standard")
        for full_pass in ("staged", "fused")
        for slots in (1, MAX_BATCH)
    ),
    *(
        Case(model=FLOAT32, dialect="standard", full_pass=full_pass, slots=slots)
        for full_pass in ("staged", "fused")
        for slots in (1, MAX_BATCH)
    ),
    *(
        Case(model=model, dialect="onnxruntime", full_pass=full_pass, slots=slots)
        for model, full_pass in ((INT4, "staged"), (INT8, "fused"), (SYMMETRIC, "staged"), (SMALL_BLOCKS, "staged"))
        for slots in (1, MAX_BATCH)
    ),
    Case(model=INT4, dialect="standard", full_pass="staged", slots=MAX_BATCH),
    Case(model=LARGE_INT4, dialect="onnxruntime", full_pass="staged", slots=MAX_BATCH, judges_memory=True),
    *(
        Case(model=LARGE, dialect=dialect, full_pass="staged", slots=slots, judges_memory=True)
        for dialect in ("onnxruntime", "standard")
        for slots in (1, MAX_BATCH)
    ),
)
