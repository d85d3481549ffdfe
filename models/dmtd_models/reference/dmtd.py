"""The DMTD model in PyTorch: encoding, thinking and decoding layers over one embedding, norm and lm_head.

The reference that exported graphs are held to, and the module that fine-tuning trains: whole sequences, no cache, no
rule about which gate is on where (``oracle`` makes the gates). For token ids x at true positions i:

    hidden  = E(embed(x))
    thought = T(hidden)
    logits  = lm_head(norm(D(select(gate_hidden, hidden) + select(gate_thought, thought))))

    input_ids, positions          [batch, n] integers
    gate_hidden, gate_thought     [batch, n] 0/1 or bool
    logits                        [batch, n, vocab]
    hidden, thought               [batch, n, hidden]
    keys, values                  one [batch, kv_heads, n, head_dim] a layer, by absolute layer number

``DmtdModel`` holds its weights; ``StreamedModel`` reads each layer's when it is needed and drops them after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dmtd_models.checkpoints.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix, layer_shapes, tensor_shapes
from dmtd_models.config.model import DmtdSpec, ModelConfig, check_dmtd
from dmtd_models.reference.layers import DecoderLayer, RMSNorm, rotary

Read = Callable[[str], np.ndarray]
StoreAt = Callable[[int, Literal["key", "value"], Tensor], Tensor]  # by absolute layer; see layers.Store

_HEAD_ROWS = 16384  # rows of the head held at a time by a streamed model


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What one pass over whole sequences computes. Keys are after rotary positions (and the k norm), as a cache's."""

    logits: Tensor  # [batch, n, vocab]
    hidden: Tensor  # [batch, n, hidden], after the encoding layers
    thought: Tensor  # [batch, n, hidden], after the thinking layers
    keys: list[Tensor]  # by absolute layer: [batch, kv_heads, n, head_dim]
    values: list[Tensor]  # by absolute layer: [batch, kv_heads, n, head_dim]


class ReferenceModel(Protocol):
    """What the oracle and verification need of a reference: either of the two classes below."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    @property
    def spec(self) -> DmtdSpec:
        """The split and the convention."""

    def __call__(self, input_ids: Tensor, positions: Tensor, gate_hidden: Tensor, gate_thought: Tensor) -> Forward:
        """Compute whole sequences; see the module."""


class Backbone(nn.Module):
    """Embedding, layers and final norm: the part that Hugging Face names ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DmtdModel(nn.Module):
    """The model with its weights in memory. Its state dict has Hugging Face's names (a tied head has no own entry)."""

    def __init__(self, config: ModelConfig, spec: DmtdSpec) -> None:
        super().__init__()
        check_dmtd(spec, config.num_layers)
        self.config = config
        self.spec = spec
        self.model = Backbone(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @classmethod
    def from_reader(cls, config: ModelConfig, spec: DmtdSpec, read: Read, dtype: torch.dtype) -> Self:
        """Build the model with weights cast to ``dtype``; ``read`` gives a tensor by name, as ``Checkpoint.read``."""
        with torch.device("meta"):
            model = cls(config, spec)
        state = {name: to_torch(read(name), dtype) for name in tensor_shapes(config)}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def forward(self, input_ids: Tensor, positions: Tensor, gate_hidden: Tensor, gate_thought: Tensor) -> Forward:
        """Compute whole sequences; shapes in the module's table."""

        def head(x: Tensor) -> Tensor:
            weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
            return functional.linear(self.model.norm(x), weight)

        embedded = self.model.embed_tokens(input_ids)
        return _forward(self, embedded, lambda i: self.model.layers[i], head, positions, gate_hidden, gate_thought)


class StreamedModel:
    """The same function with one layer's weights in memory at a time, read anew on every call: for large models."""

    def __init__(self, config: ModelConfig, spec: DmtdSpec, read: Read, dtype: torch.dtype) -> None:
        """Keep the reader; no weight is read before the first call. Arguments as ``DmtdModel.from_reader``."""
        check_dmtd(spec, config.num_layers)
        self.config = config
        self.spec = spec
        self._read = read
        self._dtype = dtype

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        gate_hidden: Tensor,
        gate_thought: Tensor,
        store: StoreAt | None = None,
    ) -> Forward:
        """Compute whole sequences without gradients; shapes in the module's table.

        ``store``: what caches give back of keys and values, which all rows then attend to; as they are by default.
        """
        # Rows of the (mapped) embedding, not all of it.
        embedded = to_torch(self._read(EMBEDDING)[input_ids.cpu().numpy()], self._dtype)
        return _forward(self, embedded, self.layer, self.head, positions, gate_hidden, gate_thought, store)

    def layer(self, index: int) -> DecoderLayer:
        """Read a layer, by absolute number."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config)
        prefix = layer_prefix(index)
        state = {name: to_torch(self._read(prefix + name), self._dtype) for name in layer_shapes(self.config)}
        layer.load_state_dict(state, strict=True, assign=True)
        return layer

    def normed(self, x: Tensor) -> Tensor:
        """What lm_head reads, [batch, n, hidden], of what the last layer gives."""
        norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict({"weight": to_torch(self._read(FINAL_NORM), self._dtype)}, assign=True)
        normed: Tensor = norm(x)
        return normed

    def head(self, x: Tensor) -> Tensor:
        """Logits [batch, n, vocab] of what the last layer gives, [batch, n, hidden]."""
        normed = self.normed(x)
        weight = self._read(EMBEDDING if self.config.tie_word_embeddings else LM_HEAD)
        parts = (weight[row : row + _HEAD_ROWS] for row in range(0, weight.shape[0], _HEAD_ROWS))
        return torch.cat([functional.linear(normed, to_torch(part, self._dtype)) for part in parts], dim=-1)


def to_torch(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A copy of an array in a torch type; bfloat16 arrays (which numpy knows through ml_dtypes) keep their bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(np.array(array)).to(dtype)


def _forward(
    model: DmtdModel | StreamedModel,
    embedded: Tensor,
    layer_at: Callable[[int], nn.Module],
    head: Callable[[Tensor], Tensor],
    positions: Tensor,
    gate_hidden: Tensor,
    gate_thought: Tensor,
    store: StoreAt | None = None,
) -> Forward:
    config, spec = model.config, model.spec
    tables = rotary(config.rope, config.head_dim, positions, embedded.dtype)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def run(x: Tensor, first: int, count: int) -> Tensor:
        for index in range(first, first + count):
            x, key, value = layer_at(index)(x, tables, None if store is None else partial(store, index))
            keys.append(key)
            values.append(value)
        return x

    hidden = run(embedded, 0, spec.encoding_layers)
    thought = run(hidden, spec.encoding_layers, spec.thinking_layers)
    # Selected, not multiplied: a row that is switched off may hold anything, and 0 * NaN is NaN.
    nothing = torch.zeros_like(hidden)
    late_input = torch.where(gate_hidden.bool()[..., None], hidden, nothing) + torch.where(
        gate_thought.bool()[..., None], thought, nothing
    )
    late = run(late_input, spec.encoding_layers + spec.thinking_layers, spec.decoding_layers)
    return Forward(logits=head(late), hidden=hidden, thought=thought, keys=keys, values=values)
