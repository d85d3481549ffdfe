"""What a checkpoint is: the architecture of its decoder and its DMTD split, read from config.json. No torch.

Foreign keys (Hugging Face's, the published DMTD ones) are translated here and in ``families.py`` and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CycleOrigin = Literal["absolute", "prompt"]
PromptInput = Literal["cyclical", "thinking", "sum"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding: base and the scaling rule with its parameters (those that ``kind`` does not use are None)."""

    theta: float
    kind: RopeKind = "default"
    factor: float | None = None
    original_max_positions: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The architecture of one decoder-only checkpoint."""

    family: str  # a key of families.FAMILIES: llama, qwen2, qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    max_positions: int
    dtype: str  # of the stored weights as config.json states it: float32, float16, bfloat16
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DmtdSpec:
    """How the decoder is split and which convention its weights were trained for (design: E + T + D layers, tau)."""

    encoding_layers: int
    thinking_layers: int
    decoding_layers: int
    cycle_length: int
    cycle_origin: CycleOrigin
    prompt_input: PromptInput
    trained: bool  # the checkpoint itself carries DMTD fields
    convention_recorded: bool  # cycle_origin and prompt_input stood in the checkpoint or were given; else defaulted
