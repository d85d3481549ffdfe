"""The decoder families as data: which config.json each one writes and what it means when a key is absent.

Read by ``model.read_config``. No behaviour lives here: every difference between families ends up as a field of
``ModelConfig`` (biases, q/k norms, head size), and nothing after that asks for the family again. No torch.

The defaults are those of transformers 5 (LlamaConfig, Qwen2Config, Qwen3Config); version 4 has the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. ``plain_types`` and ``dmtd_types`` are values of config.json's ``model_type``."""

    name: str
    plain_types: tuple[str, ...]
    dmtd_types: tuple[str, ...]
    architecture: str  # transformers' class for the plain model
    qkv_bias: Literal["always", "attention_bias"]
    o_bias_follows_attention_bias: bool
    reads_mlp_bias: bool
    qk_norm: bool
    default_head_dim: int | None  # None: hidden_size // num_attention_heads
    default_num_kv_heads: int | None  # when the key is absent; None: num_attention_heads
    default_max_positions: int
    default_bos_token_id: int | None
    default_eos_token_id: int | None


_LLAMA = Family(
    name="llama",
    plain_types=("llama",),
    dmtd_types=("mtpllama", "dmtdllama"),
    architecture="LlamaForCausalLM",
    qkv_bias="attention_bias",
    o_bias_follows_attention_bias=True,
    reads_mlp_bias=True,
    qk_norm=False,
    default_head_dim=None,
    default_num_kv_heads=None,
    default_max_positions=2048,
    default_bos_token_id=1,
    default_eos_token_id=2,
)

_QWEN2 = Family(
    name="qwen2",
    plain_types=("qwen2",),
    dmtd_types=("mtpqwen2", "dmtdqwen2"),
    architecture="Qwen2ForCausalLM",
    qkv_bias="always",
    o_bias_follows_attention_bias=False,
    reads_mlp_bias=False,
    qk_norm=False,
    default_head_dim=None,
    default_num_kv_heads=32,
    default_max_positions=32768,
    default_bos_token_id=None,
    default_eos_token_id=None,
)

_QWEN3 = Family(
    name="qwen3",
    plain_types=("qwen3",),
    dmtd_types=("mtpqwen3", "dmtdqwen3"),
    architecture="Qwen3ForCausalLM",
    qkv_bias="attention_bias",
    o_bias_follows_attention_bias=True,
    reads_mlp_bias=False,
    qk_norm=True,
    default_head_dim=128,
    default_num_kv_heads=32,
    default_max_positions=32768,
    default_bos_token_id=None,
    default_eos_token_id=None,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in (_LLAMA, _QWEN2, _QWEN3)})

# Keys of config.json that change the function computed and that no supported family has. Each is refused by name when
# its value is anything but the neutral ones listed (an absent key and null are always neutral).
REFUSED_KEYS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        # mixture of experts
        "num_experts": (0,),
        "num_local_experts": (0,),
        "n_routed_experts": (0,),
        "num_experts_per_tok": (0,),
        "moe_intermediate_size": (0,),
        # logits, attention scores and activations scaled or capped
        "final_logit_softcapping": (0,),
        "attn_logit_softcapping": (0,),
        "logit_scale": (1,),
        "logits_scaling": (1,),
        "embedding_multiplier": (1,),
        "residual_multiplier": (1,),
        "attention_multiplier": (),
        "query_pre_attn_scalar": (),
        "scale_emb": (1,),
        "clip_qkv": (),
        # positions
        "partial_rotary_factor": (1,),
        "rotary_pct": (1,),
        "no_rope_layers": ([],),
        "use_mrope": (False,),
        "alibi": (False,),
        "dual_chunk_attention_config": ({},),
        "use_dual_chunk_attention": (False,),
        # other structure
        "pretraining_tp": (0, 1),
        "quantization_config": ({},),
        "num_nextn_predict_layers": (0,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "use_qk_norm": (False,),
    }
)
