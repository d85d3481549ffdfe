"""Whole documents laid one behind another, and the decoder layer over them: how training computes, nothing about what it learns.

Stands under ``student``. A step's documents form one row of n tokens without padding, so that every matrix product has n
rows; only attention sees the boundaries. Numerics are the reference's (``layers``): float32 norms, rotary tables and
residual stream, products in the type that autocast chooses. Parameters are the modules of ``DmtdModel``, called as modules, so
that adapters wrapped around them take part.

    x                 [n, hidden] float32
    starts            first row of each document, then n
    positions         [n] true positions, from 0 in each document
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmtd_models.config.model import ModelConfig
from dmtd_models.reference.layers import rotary

_QUERY_BLOCK = 256  # about so many rows of a document have their scores computed at a time; on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where documents lie in a packed row, with what every layer needs of it."""

    starts: tuple[int, ...]  # first row of each document, then n
    cos: Tensor  # [n, 1, head_dim / 2]
    sin: Tensor  # [n, 1, head_dim / 2]
    padded: Tensor | None  # [documents, longest] packed row of each padded place; on a GPU only
    kept: Tensor | None  # [n] the flat padded place of each packed row


def make_layout(config: ModelConfig, starts: tuple[int, ...], positions: Tensor, dtype: torch.dtype) -> Layout:
    """Prepare rotary tables [n, 1, head_dim / 2] in ``dtype`` and, on a GPU, the padded view of the documents."""
    cos, sin = rotary(config.rope, config.head_dim, positions[None], dtype)
    padded, kept = None, None
    if positions.device.type != "cpu":
        padded, kept = _padded_view(starts, positions.device)
    return Layout(starts=starts, cos=cos[0, :, None], sin=sin[0, :, None], padded=padded, kept=kept)


def layer_forward(layer: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    """One decoder layer over packed documents: [n, hidden] to [n, hidden]."""
    x = x + _attention(layer.self_attn, _for_products(layer.input_layernorm(x)), layout)
    mlp = layer.mlp
    normed = _for_products(layer.post_attention_layernorm(x))
    return x + mlp.down_proj(functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def _for_products(x: Tensor) -> Tensor:
    """In the type of autocast's products, if it is on: several read the same rows, and each would cast them, forward and back."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _attention(attention: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    n, head = x.shape[0], attention.head_dim
    queries = _rotate(attention.q_norm(attention.q_proj(x).view(n, -1, head)), layout)
    keys = _rotate(attention.k_norm(attention.k_proj(x).view(n, -1, head)), layout)
    values = attention.v_proj(x).view(n, -1, head)
    if layout.padded is None:
        mixed = _by_document(queries, keys, values, layout.starts)
    else:
        mixed = _padded(queries, keys, values, layout)
    return attention.o_proj(mixed.reshape(n, -1))


def _rotate(x: Tensor, layout: Layout) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = layout.cos.to(x.dtype), layout.sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _by_document(queries: Tensor, keys: Tensor, values: Tensor, starts: tuple[int, ...]) -> Tensor:
    """Attention of each document by itself. Two plain products and a softmax: on CPUs the backward pass of torch's fused kernel
    takes 2.6 times as long (256 rows, 9 heads of 64, bfloat16).
    """
    lengths = [end - start for start, end in pairwise(starts)]
    longest = max(lengths)
    mask = torch.full((longest, longest), float("-inf"), dtype=queries.dtype).triu_(1)
    pieces = []
    # Parts of one split: of a slice alone, autograd would make a gradient of all n rows.
    documents = zip(queries.split(lengths), keys.split(lengths), values.split(lengths), strict=True)
    for asking, known, told in documents:
        # In blocks of queries: what lies behind a block is never seen. A document of 1024 tokens costs a quarter less, forward
        # and back, with the same numbers; one of 300 is cheaper whole.
        length = len(asking)
        block = math.ceil(length / max(1, round(length / _QUERY_BLOCK)))
        last = 0
        for rows in asking.split(block):
            first, last = last, last + len(rows)
            pieces.append(_causal(rows, known[:last], told[:last], mask[first:last, :last]))
    return torch.cat(pieces)


def _causal(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    n, heads, head = queries.shape
    past, groups = keys.shape[:2]
    # [groups, (heads / groups) * n, head]: query heads that share keys stand in one product.
    wide = (queries * head**-0.5).transpose(0, 1).reshape(groups, -1, head)
    scores = torch.bmm(wide, keys.permute(1, 2, 0)).view(groups, -1, n, past) + mask
    weights = torch.softmax(scores, dim=-1, dtype=scores.dtype).view(groups, -1, past)
    return torch.bmm(weights, values.transpose(0, 1)).view(heads, n, head).transpose(0, 1)


def _padded(queries: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """One fused call for all documents. Padding stands on the right, where causal attention never sees it."""
    assert layout.padded is not None and layout.kept is not None, "the layout of a GPU has its padded view"
    q, k, v = (part[layout.padded].transpose(1, 2) for part in (queries, keys, values))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(0, 1)[layout.kept]


def _padded_view(starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    begin = torch.tensor(starts[:-1])
    lengths = torch.tensor(starts[1:]) - begin
    places = torch.arange(int(lengths.max()))
    rows = (begin[:, None] + torch.minimum(places[None], lengths[:, None] - 1)).to(device)
    kept = (places[None] < lengths[:, None]).flatten().nonzero()[:, 0].to(device)
    return rows, kept
