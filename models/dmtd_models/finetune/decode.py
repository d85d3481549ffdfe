"""Batched decoding of the plain base model with a key-value cache, for writing training text.

Stands between ``dmtd`` (whose weights it uses) and ``answers`` (which chooses the tokens). The plain model is the whole
layer stack, so no gate and no cycle appears here. A batch has a fixed number of slots; each holds one sequence at its
own length and can be emptied and reused at any step, so that finished sequences cost nothing. Not a runtime: one token
a step and slot, no prompt chunks beyond the shared prefix, no exactness promise in half precision.

    tokens, lengths    int64 [slots]           the token to feed and the position it stands at
    hidden             [slots, hidden]         the final norm's output at the position just fed
    keys, values       [slots, kv_heads, window, head_dim] a layer; the window follows the longest sequence
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dmtd_models.dmtd import DmtdModel
from dmtd_models.layers import Attention, DecoderLayer, rotary, rotate

_WINDOW_STEP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _FusedLayer:
    """One layer with the matmuls that share an input laid side by side: fewer and larger calls."""

    layer: DecoderLayer
    qkv: Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    gate_up: Tensor  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None


class SlotDecoder:
    """The plain model over ``slots`` independent sequences of at most ``capacity`` tokens each."""

    def __init__(self, model: DmtdModel, *, slots: int, capacity: int) -> None:
        """Fuse the weights (a copy of them) and allocate the caches on the model's device, in its type."""
        config = model.config
        weight = model.model.embed_tokens.weight
        self.config = config
        self.slots = slots
        self.capacity = capacity
        self._model = model
        self._layers = [_fuse(layer) for layer in model.model.layers]
        self._head = weight if model.lm_head is None else model.lm_head.weight
        self._window = _WINDOW_STEP
        self._keys = self._empty(self._window)
        self._values = self._empty(self._window)
        self._rows = torch.arange(slots * config.num_kv_heads, device=weight.device)
        positions = torch.arange(capacity, device=weight.device)
        cos, sin = rotary(config.rope, config.head_dim, positions[None], weight.dtype)
        self._cos, self._sin = cos[0], sin[0]
        self._prefix_len = 0
        self._prefix_keys: list[Tensor] = []
        self._prefix_values: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where the weights and caches are."""
        return self._head.device

    @torch.no_grad()
    def set_prefix(self, ids: Sequence[int]) -> None:
        """Compute the keys and values of tokens that every sequence begins with; they overwrite slot 0.

        They are kept, and ``restart`` gives them to a slot without computing them again.
        """
        assert len(ids) < self.capacity, f"a prefix of {len(ids)} tokens leaves no room in {self.capacity}"
        tokens = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        lengths = torch.zeros_like(tokens)
        for position, token in enumerate(ids):
            tokens[0] = token
            lengths[0] = position
            self.step(tokens, lengths, longest=position + 1)
        self._prefix_len = len(ids)
        self._prefix_keys = [cache[0, :, : len(ids)].clone() for cache in self._keys]
        self._prefix_values = [cache[0, :, : len(ids)].clone() for cache in self._values]

    def restart(self, slot: int) -> int:
        """Empty a slot but for the shared prefix; returns the position of the next token to feed."""
        for caches, prefixes in ((self._keys, self._prefix_keys), (self._values, self._prefix_values)):
            for cache, prefix in zip(caches, prefixes, strict=bool(prefixes)):
                cache[slot, :, : self._prefix_len] = prefix
        return self._prefix_len

    @torch.no_grad()
    def step(self, tokens: Tensor, lengths: Tensor, *, longest: int) -> Tensor:
        """Feed one token to every slot and return the final norm's output after it, [slots, hidden].

        Args:
            tokens: int64 [slots]. A slot that is not in use may be fed anything, at any position.
            lengths: int64 [slots], tokens already in each slot, below ``capacity``: the position of the new one.
            longest: the largest of ``lengths`` plus one; a plain integer, so that a GPU need not be waited for.
        """
        self._fit(longest)
        x = self._model.model.embed_tokens(tokens)
        tables = (self._cos[lengths][:, None], self._sin[lengths][:, None])
        visible = torch.arange(self._window, device=self.device)[None] <= lengths[:, None]
        mask = torch.zeros(visible.shape, dtype=x.dtype, device=self.device)
        mask = mask.masked_fill_(~visible, float("-inf"))
        mask = mask.repeat_interleave(self.config.num_kv_heads, dim=0)[:, None]  # [slots * kv_heads, 1, window]
        written = self._rows * self._window + lengths.repeat_interleave(self.config.num_kv_heads)
        for index, fused in enumerate(self._layers):
            x = x + self._attend(index, fused, x, tables, written, mask)
            normed = fused.layer.post_attention_layernorm(x)
            gate, up = functional.linear(normed, fused.gate_up, fused.gate_up_bias).chunk(2, dim=-1)
            x = x + fused.layer.mlp.down_proj(functional.silu(gate) * up)
        return self._model.model.norm(x)

    @torch.no_grad()
    def candidates(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The largest logits of some slots, and their tokens.

        In half precision the logits of all tokens only select: near 27, say, bfloat16 knows steps of 1/8, and several
        tokens would tie. Those selected are computed again in float32.

        Args:
            hidden: [rows, hidden], rows of what ``step`` returned.
            count: how many of each row.

        Returns:
            Logits in float32, sorted from the largest, and token ids, both [rows, min(count, vocab)].
        """
        logits = functional.linear(hidden, self._head)
        values, tokens = largest(logits, min(count, logits.shape[-1]))
        if logits.dtype == torch.float32:
            return values, tokens
        exact = torch.bmm(self._head[tokens].float(), hidden.float()[..., None]).squeeze(-1)
        values, order = exact.sort(dim=-1, descending=True)
        return values, tokens.gather(-1, order)

    def _attend(
        self, index: int, fused: _FusedLayer, x: Tensor, tables: tuple[Tensor, Tensor], written: Tensor, mask: Tensor
    ) -> Tensor:
        config, attention = self.config, fused.layer.self_attn
        assert isinstance(attention, Attention), "a decoder layer's attention"
        head, kv_heads = config.head_dim, config.num_kv_heads
        projected = functional.linear(fused.layer.input_layernorm(x), fused.qkv, fused.qkv_bias)
        parts = projected.view(self.slots, 1, -1, head).transpose(1, 2)  # [slots, heads + 2 kv_heads, 1, head_dim]
        queries, keys, values = parts.split((config.num_heads, kv_heads, kv_heads), dim=1)
        queries = rotate(attention.q_norm(queries), *tables)
        all_keys = self._keys[index].view(-1, self._window, head)  # [slots * kv_heads, window, head_dim]
        all_values = self._values[index].view(-1, self._window, head)
        all_keys.view(-1, head).index_copy_(0, written, rotate(attention.k_norm(keys), *tables).reshape(-1, head))
        all_values.view(-1, head).index_copy_(0, written, values.reshape(-1, head))
        # The query heads of one key head as rows of one product: each key is read once, several times faster on a CPU
        # than scaled_dot_product_attention. Contiguous caches matter: bmm copies any other.
        grouped = queries.reshape(self.slots * kv_heads, -1, head) * head**-0.5
        scores = torch.bmm(grouped, all_keys.transpose(1, 2)) + mask
        mixed = torch.bmm(torch.softmax(scores, dim=-1), all_values)
        return attention.o_proj(mixed.view(self.slots, -1))

    def _fit(self, longest: int) -> None:
        """Make the window hold the longest sequence, and not much more: every step reads all of it."""
        assert longest <= self.capacity, f"a sequence of {longest} tokens in a capacity of {self.capacity}"
        wanted = -(-longest // _WINDOW_STEP) * _WINDOW_STEP
        if wanted == self._window or wanted == self._window - _WINDOW_STEP:
            return
        kept = min(wanted, self._window)
        keys, values = self._empty(wanted), self._empty(wanted)
        for new, old in zip(keys + values, self._keys + self._values, strict=True):
            new[:, :, :kept] = old[:, :, :kept]
        self._keys, self._values, self._window = keys, values, wanted

    def _empty(self, window: int) -> list[Tensor]:
        # Zeros: rows above a sequence's length are masked, but a NaN there would survive the mask.
        shape = (self.slots, self.config.num_kv_heads, window, self.config.head_dim)
        return [torch.zeros(shape, dtype=self._head.dtype, device=self.device) for _ in self._layers]


def largest(logits: Tensor, count: int, *, block: int = 16) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row in float32, sorted, and where: exact, by the blocks with the largest maxima."""
    rows, vocab = logits.shape
    columns = vocab // block
    if vocab % block or columns < count:
        plain = logits.float().topk(count)
        return plain.values, plain.indices
    grid = logits.view(rows, block, columns)
    best = grid.amax(1).topk(count, sorted=False).indices
    candidates = grid.gather(2, best[:, None].expand(-1, block, -1)).reshape(rows, -1).float()
    values, places = candidates.topk(count)
    tokens = places // count * columns + best.gather(1, places % count)
    return values, tokens


def _fuse(layer: DecoderLayer) -> _FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up = (mlp.gate_proj, mlp.up_proj)
    return _FusedLayer(
        layer=layer,
        qkv=torch.cat([part.weight.detach() for part in qkv]),
        qkv_bias=None if qkv[0].bias is None else torch.cat([part.bias.detach() for part in qkv]),
        gate_up=torch.cat([part.weight.detach() for part in gate_up]),
        gate_up_bias=None if mlp.gate_proj.bias is None else torch.cat([part.bias.detach() for part in gate_up]),
    )
