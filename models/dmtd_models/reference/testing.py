"""Tiny seeded random checkpoints in the published form, for tests. numpy and safetensors only, no torch.

The weights are large enough for every layer to matter: logits of different conventions differ clearly, and a changed
weight shows far above rounding. The words such a model writes mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from dmtd_models.checkpoints.tensors import EMBEDDING, LM_HEAD, tensor_shapes
from dmtd_models.config.families import FAMILIES
from dmtd_models.config.hf import rope_fields
from dmtd_models.config.model import ModelConfig, Rope, read_config

StoredDtype = Literal["float64", "float32", "float16", "bfloat16"]

TOKENIZER_VOCAB_SIZE = 259  # the 256 bytes and the three special tokens
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_checkpoint(
    directory: Path,
    *,
    family: str = "qwen3",
    seed: int = 0,
    layers: int = 4,
    dmtd: Mapping[str, object] | None = None,
    dtype: StoredDtype = "float32",
    rope: Rope | None = None,
    tie: bool = False,
    qkv_bias: bool = False,
    mlp_bias: bool = False,
    vocab_size: int | None = None,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    max_positions: int = 256,
    shards: int = 1,
    tokenizer: bool = False,
) -> Path:
    """Write a random checkpoint directory and return it.

    What is not simply a field of config.json:
        directory: made if it does not exist.
        family: llama, qwen2 or qwen3.
        seed: of the weights; the same seed gives the same file.
        dmtd: DMTD fields exactly as config.json carries them (``num_thinking_layers``, ``mtp_horizon``, ...); they also
            make the model_type ``mtp<family>``, or ``dmtd<family>`` where the fields are those of the later code.
        dtype: of the stored weights.
        rope: default: base 10000, unscaled.
        tie: one tensor for the embedding and lm_head.
        qkv_bias: attention_bias, biases of q, k, v and o (llama and qwen3; Qwen2 always has those of q, k and v).
        vocab_size: default 128, or 259 with a tokenizer (at least 259 then).
        shards: more than 1 writes model-0000i-of-0000n.safetensors and the index.
        tokenizer: also write a byte-level tokenizer.json with a chat template; <|im_end|> (258) ends a turn.
    """
    vocab_size = vocab_size or (TOKENIZER_VOCAB_SIZE if tokenizer else 128)
    assert not tokenizer or vocab_size >= TOKENIZER_VOCAB_SIZE, "the byte-level tokenizer needs 259 ids"
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    sizes |= {"num_hidden_layers": layers, "max_position_embeddings": max_positions}
    biases = {"attention_bias": qkv_bias, **({"mlp_bias": mlp_bias} if family == "llama" else {})}
    stored = {"torch_dtype": dtype, "tie_word_embeddings": tie, **rope_fields(rope or Rope(theta=10000.0))}
    raw = _usual_fields(family, layers, tokenizer=tokenizer) | sizes | biases | stored | _dmtd_fields(family, dmtd)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    config, _ = read_config(raw)
    _write_weights(directory, random_weights(config, seed=seed, dtype=dtype), shards=shards)
    if tokenizer:
        _write_tokenizer(directory)
    return directory


def _usual_fields(family: str, layers: int, *, tokenizer: bool) -> dict[str, object]:
    """What published config.json files have besides sizes."""
    fields: dict[str, object] = {
        "architectures": [FAMILIES[family].architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 256 if tokenizer else 1,
        "eos_token_id": 258 if tokenizer else 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": family,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
    }
    if family != "llama":
        fields |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": layers}
    return fields


def _dmtd_fields(family: str, dmtd: Mapping[str, object] | None) -> dict[str, object]:
    if dmtd is None:
        return {}
    kind = "dmtd" if "num_parallel_layers" in dmtd else "mtp"
    architecture = f"{kind.upper()}{FAMILIES[family].architecture}"
    return {"architectures": [architecture], "model_type": f"{kind}{family}", **dmtd}


def random_weights(config: ModelConfig, *, seed: int, dtype: StoredDtype = "float32") -> dict[str, np.ndarray]:
    """Every tensor of the architecture, seeded; each layer adds about as much to the stream as the embedding."""
    rng = np.random.default_rng(seed)
    stored = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1.0 + 0.2 * values
        elif name.endswith("bias"):
            values *= 0.3
        elif name not in (EMBEDDING, LM_HEAD):
            # Queries and keys a little larger, so that attention is far from uniform.
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.2
            values *= gain / np.sqrt(shape[1])
        elif name == LM_HEAD:
            values *= 2.0 / np.sqrt(shape[1])
        else:
            values *= 0.3
        weights[name] = values.astype(stored)
    return weights


def _write_weights(directory: Path, weights: dict[str, np.ndarray], *, shards: int) -> None:
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    made.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": _SPECIAL_TOKENS[0],
        "eos_token": _SPECIAL_TOKENS[2],
        "pad_token": _SPECIAL_TOKENS[0],
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
