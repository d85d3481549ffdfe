"""Translating a GGUF file's metadata to ``ModelConfig``. No torch, no file access.

Stands under ``checkpoints.gguf``. Keys of the architecture that are not known here are refused by name: they may change
the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmtd_models.config.families import FAMILIES
from dmtd_models.config.hf import to_hugging_face
from dmtd_models.config.model import ModelConfig, Rope, read_config
from dmtd_models.config.rope import yarn_factor
from dmtd_models.errors import CheckpointError, ConfigError

_KNOWN_KEYS = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        *("rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
        "rope.scaling.yarn_attn_factor",  # written by the converter, and overwritten by llama.cpp with yarn's own
    )
)
# Unknown keys are let through at these values, which mean "not in use".
_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (1,),
    "logit_scale": (0, 1),
    "embedding_scale": (1,),
    "residual_scale": (1,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_ROPE_FACTOR_TOLERANCE = 1e-5


def config_from_metadata(
    path: Path,
    metadata: Mapping[str, object],
    *,
    tensor_shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    rope_factors: npt.NDArray[np.generic] | None,
) -> ModelConfig:
    """Build the architecture from metadata and from which tensors there are (biases, a head of its own).

    Args:
        path: for messages.
        metadata: the file's key-value pairs.
        tensor_shapes: shapes by GGUF tensor name, slowest dimension first.
        dtype: of the weights as read.
        rope_factors: the tensor ``rope_freqs.weight`` [head_dim / 2] where there is one.

    Raises:
        ConfigError: an architecture or a key that is not supported.
        CheckpointError: a key that is missing.
    """
    family, own = _family_and_keys(path, metadata)
    if "token_embd.weight" not in tensor_shapes:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing; download the file again")
    num_heads = _count(path, own, "attention.head_count")
    head_dim = _count(path, own, "attention.key_length", _count(path, own, "embedding_length") // max(num_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if _count(path, own, key, head_dim) != head_dim:
            raise ConfigError(f"{path}: {family}.{key}: got {own[key]}, expected the head's size {head_dim}")
    max_positions = _count(path, own, "context_length")
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    config = ModelConfig(
        family=family,
        vocab_size=tensor_shapes["token_embd.weight"][0],
        hidden_size=_count(path, own, "embedding_length"),
        intermediate_size=_count(path, own, "feed_forward_length"),
        num_layers=_count(path, own, "block_count"),
        num_heads=num_heads,
        num_kv_heads=_count(path, own, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=_decimal(path, own, "attention.layer_norm_rms_epsilon"),
        rope=_rope(path, own, head_dim, max_positions, rope_factors),
        tie_word_embeddings="output.weight" not in tensor_shapes,
        max_positions=max_positions,
        dtype=dtype,
        qkv_bias=family == "qwen2" or "blk.0.attn_q.bias" in tensor_shapes,
        o_bias="blk.0.attn_output.bias" in tensor_shapes,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_shapes,
        qk_norm=FAMILIES[family].qk_norm,
        bos_token_id=int(bos) if isinstance(bos, int) else None,
        eos_token_ids=_end_ids(metadata),
    )
    # The one place that checks sizes; what it would read differently, a config.json could not express.
    again, _ = read_config(to_hugging_face(config))
    if again != config:
        raise ConfigError(f"{path}: the biases of this file are not a combination that {family} models have")
    return config


def _family_and_keys(path: Path, metadata: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """The family, and the metadata under its name; what is not known there is refused."""
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ConfigError(f"{path}: general.architecture: got {family!r}, expected one of {', '.join(FAMILIES)}")
    own = {key.removeprefix(f"{family}."): value for key, value in metadata.items() if key.startswith(f"{family}.")}
    for key, value in own.items():
        read = _KNOWN_KEYS | {"rope.scaling.attn_factor"} if own.get("rope.scaling.type") == "yarn" else _KNOWN_KEYS
        if key not in read and value not in _NEUTRAL.get(key, ()):
            raise ConfigError(f"{path}: {family}.{key}: got {value!r}, which may change the output; not supported")
    return str(family), own


def _end_ids(metadata: Mapping[str, object]) -> tuple[int, ...]:
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(int(i) for i in ids if isinstance(i, int)))


def _rope(
    path: Path,
    own: Mapping[str, object],
    head_dim: int,
    max_positions: int,
    rope_factors: npt.NDArray[np.generic] | None,
) -> Rope:
    theta = _decimal(path, own, "rope.freq_base", 10000.0)
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    factor = _decimal(path, own, "rope.scaling.factor", _decimal(path, own, "rope.scale_linear", 1.0))
    if rope_factors is not None:
        if kind not in ("none", "llama3"):
            raise ConfigError(f"{path}: rope.scaling.type {kind!r} together with rope_freqs.weight is not supported")
        return _rope_of_factors(path, theta, head_dim, [float(value) for value in rope_factors.ravel()])
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        scale = _decimal(path, own, "rope.scaling.attn_factor", 1.0)  # llama.cpp multiplies yarn's own factor by it
        return Rope(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_positions=_count(path, own, "rope.scaling.original_context_length", max_positions),
            beta_fast=_decimal(path, own, "rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=_decimal(path, own, "rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=None if scale in (0.0, 1.0) else scale * yarn_factor(factor),
        )
    raise ConfigError(f"{path}: rope.scaling.type: got {kind!r}, expected none, linear or yarn")


def _rope_of_factors(path: Path, theta: float, head_dim: int, factors: Sequence[float]) -> Rope:
    """Recognise the llama3 rule in the divisors of the frequencies that it was stored as.

    Its parameters are not in the file. All published models have low and high factors 1 and 4; the largest divisor is
    the factor, and the original length is tried over powers of two. Divisors that no such rule gives are refused.
    """
    if all(factor == 1.0 for factor in factors):
        return Rope(theta=theta)
    rope_factor = max(factors)
    for original in (2**power for power in range(5, 21)):
        expected = [_llama3_divisor(theta ** (-2 * i / head_dim), rope_factor, original) for i in range(head_dim // 2)]
        if len(expected) == len(factors) and np.allclose(factors, expected, rtol=_ROPE_FACTOR_TOLERANCE, atol=0):
            return Rope(
                theta=theta,
                kind="llama3",
                factor=rope_factor,
                original_max_positions=original,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            )
    raise ConfigError(f"{path}: rope_freqs.weight: got divisors that are not llama3's rule (1, 4); not supported")


def _llama3_divisor(frequency: float, factor: float, original: int) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < original / 4:
        return 1.0
    if wavelength > original:
        return factor
    smooth = (original / wavelength - 1.0) / 3.0
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _count(path: Path, own: Mapping[str, object], key: str, default: int | None = None) -> int:
    """An integer; a list with one value for each layer counts as that value if all are equal."""
    value = own.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ConfigError(f"{path}: {key}: differs from layer to layer, which is not supported")
    if not isinstance(value, int):
        raise CheckpointError(f"{path}: {key}: got {value!r}, expected an integer; download the file again")
    return value


def _decimal(path: Path, own: Mapping[str, object], key: str, default: float | None = None) -> float:
    """A float32 as the decimal it was written from: 9.999999747378752e-06 is 1e-05."""
    value = own.get(key, default)
    if not isinstance(value, int | float):
        raise CheckpointError(f"{path}: {key}: got {value!r}, expected a number; download the file again")
    return float(str(np.float32(value)))
