"""The decoder layer in PyTorch, one for every family: biases, q/k norms and grouped heads follow from the config.

Stands under ``dmtd``, the reference model. Parameter names are Hugging Face's. Numerics follow transformers: norms and
rotary tables are computed in float32 whatever the type of the model, then cast to it. No cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmtd_models.config.model import ModelConfig, Rope
from dmtd_models.reference.rope import attention_factor, yarn_range

Store = Callable[[Literal["key", "value"], Tensor], Tensor]
"""Keys or values [batch, kv_heads, n, head_dim] -> what a cache that rounds gives back of them."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, accumulated in float32 (in a float64 model too, as in transformers)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, head = config.hidden_size, config.head_dim
        self.head_dim = head
        self.q_proj = nn.Linear(hidden, config.num_heads * head, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * head, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * head, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * head, hidden, bias=config.o_bias)
        self.q_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], store: Store | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output [batch, n, hidden] and the keys and values [batch, kv_heads, n, head_dim] of a cache."""
        batch, n, _ = x.shape
        split = (batch, n, -1, self.head_dim)
        queries = rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2), *rotary)
        keys = rotate(self.k_norm(self.k_proj(x).view(split)).transpose(1, 2), *rotary)
        values = self.v_proj(x).view(split).transpose(1, 2)
        if store is not None:
            keys, values = store("key", keys), store("value", values)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, n, -1)), keys, values


class MLP(nn.Module):
    """The gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], store: Store | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the stream [batch, n, hidden] and this layer's keys and values [batch, kv_heads, n, head_dim]."""
        mixed, keys, values = self.self_attn(self.input_layernorm(x), rotary, store)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of [batch, heads, n, head_dim] by [batch, n, head_dim / 2] tables."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary(rope: Rope, head_dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [batch, n, head_dim / 2] of true positions [batch, n], by transformers' float32 operations."""
    frequencies = inverse_frequencies(rope, head_dim).to(positions.device)
    angles = positions[..., None].to(torch.float32) * frequencies
    scale = attention_factor(rope)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """The angle that one position adds, float32 [head_dim / 2], operation by operation as transformers computes it."""
    periods: Tensor = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    base = 1.0 / periods
    if rope.kind == "default":
        return base
    assert rope.factor is not None, "every scaled rope has a factor"
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, rope.factor, base)
    low, high = yarn_range(rope, head_dim)
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - kept) + base * kept


def _llama3(rope: Rope, factor: float, base: Tensor) -> Tensor:
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions
    assert low is not None and high is not None and original is not None, "llama3 parameters are filled"
    wavelength = 2 * torch.pi / base
    stretched = torch.where(wavelength > original / low, base / factor, base)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    medium = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(medium, between, stretched)
