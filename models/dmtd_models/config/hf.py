"""Writing config.json: the inverse of ``model.read_config``, in the form of transformers 4, which version 5 reads too.

Used where a checkpoint has no config.json of its own (GGUF), by fine-tuning, and by the tiny test checkpoints.
"""

from __future__ import annotations

from dataclasses import asdict

from dmtd_models.config.families import FAMILIES
from dmtd_models.config.model import DmtdSpec, ModelConfig, Rope

_ROPE_NAMES = {"kind": "rope_type", "original_max_positions": "original_max_position_embeddings"}


def to_hugging_face(config: ModelConfig) -> dict[str, object]:
    """The contents of a config.json that ``read_config`` reads back to an equal config."""
    family = FAMILIES[config.family]
    eos = config.eos_token_ids
    raw: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.plain_types[0],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        **rope_fields(config.rope),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "torch_dtype": config.dtype,
        "use_cache": True,
    }
    if family.qkv_bias == "attention_bias":
        raw["attention_bias"] = config.qkv_bias
    if family.reads_mlp_bias:
        raw["mlp_bias"] = config.mlp_bias
    return raw


def with_dmtd_fields(raw: dict[str, object], spec: DmtdSpec | None, family: str) -> dict[str, object]:
    """A config.json's contents with the published DMTD fields and model type, and our two fields of the convention.

    Without ``spec`` every value is None: the names alone.
    """
    known = FAMILIES[family]
    kind = known.dmtd_types[0]
    return {
        **raw,
        "architectures": None if spec is None else [kind.removesuffix(known.name).upper() + known.architecture],
        "model_type": None if spec is None else kind,
        "num_encoding_layers": None if spec is None else spec.encoding_layers,
        "num_thinking_layers": None if spec is None else spec.thinking_layers,
        "num_decoding_layers": None if spec is None else spec.decoding_layers,
        "mtp_horizon": None if spec is None else spec.cycle_length,
        "cycle_origin": None if spec is None else spec.cycle_origin,
        "prompt_input": None if spec is None else spec.prompt_input,
    }


def rope_fields(rope: Rope) -> dict[str, object]:
    """``rope_theta`` and ``rope_scaling``."""
    scaling = {_ROPE_NAMES.get(key, key): value for key, value in asdict(rope).items() if value is not None}
    theta = scaling.pop("theta")
    if rope.kind != "yarn":
        scaling.pop("truncate")
    return {"rope_theta": theta, "rope_scaling": None if rope.kind == "default" else scaling}
