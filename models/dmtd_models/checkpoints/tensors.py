"""The tensors of a checkpoint: Hugging Face names and shapes, from the architecture alone. No torch.

Read by the checkpoint readers (what must be there), by the tiny checkpoints of the tests and by the torch reference.
"""

from __future__ import annotations

from dmtd_models.config.model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """The prefix of one decoder layer's tensor names, by absolute layer number."""
    return f"model.layers.{layer}."


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names (after the layer's prefix) and shapes of one layer's tensors; linear weights are [out, in]."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    rows = {
        "q_proj": config.num_heads * head,
        "k_proj": config.num_kv_heads * head,
        "v_proj": config.num_kv_heads * head,
    }
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, size in rows.items():
        shapes[f"self_attn.{name}.weight"] = (size, hidden)
        if config.qkv_bias:
            shapes[f"self_attn.{name}.bias"] = (size,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (head,)
        shapes["self_attn.k_norm.weight"] = (head,)
    shapes["self_attn.o_proj.weight"] = (hidden, config.num_heads * head)
    if config.o_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    for name, (out_size, in_size) in {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}.items():
        shapes[f"mlp.{name}.weight"] = (out_size, in_size)
        if config.mlp_bias:
            shapes[f"mlp.{name}.bias"] = (out_size,)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    if config.mlp_bias:
        shapes["mlp.down_proj.bias"] = (hidden,)
    return shapes


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint in the order of computation; ``lm_head.weight`` only if it is not tied."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    one_layer = layer_shapes(config)
    for layer in range(config.num_layers):
        shapes.update({layer_prefix(layer) + name: shape for name, shape in one_layer.items()})
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes
