"""Writing small GGUF files for the tests beside this one, as converters do, but by code of their own."""

from pathlib import Path

import gguf
import numpy as np

from dmtd_models.config.model import ModelConfig, Rope

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    **{f"self_attn.{letter}_norm": f"attn_{letter}_norm" for letter in "qk"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def tiny_config(family, **changes):
    fields = {
        **{"family": family, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2},
        **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope": Rope(theta=10000.0)},
        **{"tie_word_embeddings": False, "max_positions": 512, "dtype": "float32", "qkv_bias": family == "qwen2"},
        **{"qk_norm": family == "qwen3", "bos_token_id": 1, "eos_token_ids": (2,)},
    }
    return ModelConfig(**{**fields, **changes})


def gguf_name(name):
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def permuted(array, heads):
    """The row order of llama files: rotary pairs side by side. Row by row."""
    head = array.shape[0] // heads
    out = np.empty_like(array)
    for h in range(heads):
        for i in range(head // 2):
            out[h * head + 2 * i] = array[h * head + i]
            out[h * head + 2 * i + 1] = array[h * head + head // 2 + i]
    return out


def write_gguf(
    path: Path, config: ModelConfig, weights, *, quantise=None, stored=None, metadata=None, extra=None, tokenizer=None
):
    """Write a file; ``quantise`` maps a tensor's number of dimensions to a type, ``stored`` gives raw bytes by name."""
    arch = config.family
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope.theta,
        "rope.dimension_count": config.head_dim,
        **(metadata or {}),
    }
    for key, value in values.items():
        add(writer, f"{arch}.{key}" if not key.startswith(("general.", "split.", "tokenizer.")) else key, value)
    for key, value in {
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_ids[0],
        **(tokenizer or {}),
    }.items():
        add(writer, key, value)
    for name, weight in weights.items():
        array = np.asarray(weight)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permuted(array, config.num_heads if "q_proj" in name else config.num_kv_heads)
        if name in (stored or {}):
            raw, kind = stored[name]
            writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        kind = (quantise or {}).get(array.ndim, "F32")
        if kind == "BF16":
            raw = np.ascontiguousarray(array).view(np.uint8)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(gguf_name(name), array.astype({"F32": np.float32, "F16": np.float16}[kind]))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
