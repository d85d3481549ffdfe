"""Batched decoding of the plain base model with a key-value cache, for writing training text.

Stands between ``dmtd`` (whose weights it uses) and ``answers`` (which chooses the tokens). The plain model is the whole
layer stack, so no gate and no cycle appears here. A batch has a fixed number of slots; each holds one sequence at its
own length and can be emptied and reused at any step, so that finished sequences cost nothing. Not a runtime: one token
a step and slot, no prompt chunks beyond the shared prefix, no exactness promise in half precision.

    tokens, positions  [slots] integers        the token to feed and the position it stands at
    hidden             [slots, hidden]         the final norm's output at the position just fed
    keys, values       [slots of a group, kv_heads, window, head_dim] a layer; the window follows the longest
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from dmtd_models.finetune.largest import largest
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.layers import Attention, DecoderLayer, rotary, rotate

_WINDOW_STEP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _FusedLayer:
    """One layer with the matmuls that share an input laid side by side: fewer and larger calls."""

    layer: DecoderLayer
    qkv: Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    gate_up: Tensor  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None


class _Group:
    """The caches of neighbouring slots: one window, that of the longest of them.

    Each cache is a contiguous view of memory for the full capacity: fresh memory for every window would cost more than
    the steps.
    """

    def __init__(self, *, slots: slice, capacity: int, layers: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        count = slots.stop - slots.start
        self.slots = slots
        self.rows = torch.arange(count * kv_heads, device=like.device)
        self.window = min(_WINDOW_STEP, capacity)
        self._capacity = capacity
        self._shape = (count, kv_heads, self.window, head_dim)
        # Zeros: rows above a sequence's length are masked, but a NaN there would survive the mask.
        self._memory = [like.new_zeros(count * kv_heads * capacity * head_dim) for _ in range(2 * layers)]
        self.caches = [_view(memory, self._shape) for memory in self._memory]  # keys of all layers, then values

    def fit(self, longest: int) -> None:
        """Make the window hold the longest sequence, and not much more: every step reads all of it."""
        wanted = min(-(-longest // _WINDOW_STEP) * _WINDOW_STEP, self._capacity)
        if wanted in (self.window, self.window - _WINDOW_STEP):
            return
        count, kv_heads, _, head_dim = self._shape
        self._shape = (count, kv_heads, wanted, head_dim)
        kept = min(wanted, self.window)
        for index, memory in enumerate(self._memory):
            old = self.caches[index][:, :, :kept].clone()
            self.caches[index] = _view(memory, self._shape)
            self.caches[index][:, :, :kept] = old
        self.window = wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What a step does in one group, the same in every layer."""

    group: _Group
    written: Tensor  # [slots * kv_heads], rows of the flattened cache
    mask: Tensor  # [slots * kv_heads, 1, window]


class SlotDecoder:
    """The plain model over ``slots`` independent sequences of at most ``capacity`` tokens each."""

    def __init__(self, model: DmtdModel, *, slots: int, capacity: int, groups: int = 1) -> None:
        """Fuse the weights (a copy of them) and place the caches on the model's device, in its type.

        Args:
            model: its plain mode is computed.
            slots: sequences at a time.
            capacity: most tokens of one.
            groups: caches are cut into this many groups of neighbouring slots. A step reads as much for each slot of a
                group as for its longest, so with ``arrange`` more groups read less, in more and smaller calls.
        """
        config = model.config
        weight = model.model.embed_tokens.weight.detach()
        self.config = config
        self.slots = slots
        self.capacity = capacity
        self._model = model
        self._layers = [_fuse(layer) for layer in model.model.layers]
        self._head = weight if model.lm_head is None else model.lm_head.weight.detach()
        bounds = [slots * group // groups for group in range(groups + 1)]
        self._groups = [
            _Group(
                slots=slice(first, end),
                capacity=capacity,
                layers=config.num_layers,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                like=weight,
            )
            for first, end in pairwise(bounds)
            if end > first
        ]
        positions = torch.arange(capacity, device=weight.device)
        cos, sin = rotary(config.rope, config.head_dim, positions[None], weight.dtype)
        self._cos, self._sin = cos[0], sin[0]
        self._prefix_len = 0
        self._prefix: list[Tensor] = []  # keys of all layers, then values: [kv_heads, prefix_len, head_dim]

    @property
    def device(self) -> torch.device:
        """Where the weights and caches are."""
        return self._head.device

    def set_prefix(self, ids: Sequence[int]) -> None:
        """Compute the keys and values of tokens that every sequence begins with; they overwrite slot 0.

        They are kept, and ``restart`` gives them to a slot without computing them again.
        """
        assert len(ids) < self.capacity, f"a prefix of {len(ids)} tokens leaves no room in {self.capacity}"
        others = [0] * (self.slots - 1)
        for position, token in enumerate(ids):
            self.step([token, *others], [position, *others])
        group = self._groups[0]
        self._prefix_len = len(ids)
        self._prefix = [cache[0, :, : len(ids)].clone() for cache in group.caches]

    def restart(self, slot: int) -> int:
        """Empty a slot but for the shared prefix; returns the position of the next token to feed."""
        group, row = self._find(slot)
        group.fit(max(self._prefix_len, group.window))
        for cache, prefix in zip(group.caches, self._prefix, strict=False):
            cache[row, :, : self._prefix_len] = prefix
        return self._prefix_len

    def arrange(self, positions: Sequence[int]) -> list[int]:
        """Bring sequences of like length into one group, moving as few as possible.

        Args:
            positions: the number of tokens in each slot.

        Returns:
            For each slot the one that held its present sequence before.
        """
        ranked = sorted(range(self.slots), key=lambda slot: positions[slot])
        order = list(range(self.slots))
        for group in self._groups:
            inside = range(group.slots.start, group.slots.stop)
            members = ranked[group.slots]
            free = [slot for slot in inside if slot not in members]
            arriving = [slot for slot in members if slot not in inside]
            for slot, source in zip(free, arriving, strict=True):
                order[slot] = source
        moved = [(slot, source) for slot, source in enumerate(order) if slot != source]
        taken = [self._rows_of(source, positions[source]) for _, source in moved]
        taken = [[part.clone() for part in parts] for parts in taken]
        for group in self._groups:
            group.fit(max(1, *(positions[source] for source in order[group.slots])))
        for (slot, source), parts in zip(moved, taken, strict=True):
            for new, part in zip(self._rows_of(slot, positions[source]), parts, strict=True):
                new[:] = part
        return order

    @torch.no_grad()
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Feed one token to every slot and return the final norm's output after it, [slots, hidden].

        Args:
            tokens: one a slot. A slot that is not in use may be fed anything, at any position.
            positions: tokens already in each slot, below ``capacity``: where the new one stands.
        """
        assert max(positions) < self.capacity, f"a sequence of {max(positions) + 1} tokens, capacity {self.capacity}"
        x = self._model.model.embed_tokens(torch.tensor(tokens, device=self.device))
        lengths = torch.tensor(positions, device=self.device)
        tables = (self._cos[lengths][:, None], self._sin[lengths][:, None])
        places = [self._place(group, positions[group.slots], lengths[group.slots]) for group in self._groups]
        for index, fused in enumerate(self._layers):
            x = x + self._attend(index, fused, x, tables, places)
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

    def _find(self, slot: int) -> tuple[_Group, int]:
        group = next(group for group in self._groups if slot < group.slots.stop)
        return group, slot - group.slots.start

    def _rows_of(self, slot: int, length: int) -> list[Tensor]:
        group, row = self._find(slot)
        return [cache[row, :, :length] for cache in group.caches]

    def _place(self, group: _Group, positions: Sequence[int], lengths: Tensor) -> _Place:
        group.fit(max(positions) + 1)
        hidden = torch.arange(group.window, device=self.device)[None] > lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._head.dtype, device=self.device)
        mask = mask.masked_fill_(hidden, float("-inf")).repeat_interleave(self.config.num_kv_heads, dim=0)[:, None]
        written = group.rows * group.window + lengths.repeat_interleave(self.config.num_kv_heads)
        return _Place(group=group, written=written, mask=mask)

    def _attend(
        self, index: int, fused: _FusedLayer, x: Tensor, tables: tuple[Tensor, Tensor], places: Sequence[_Place]
    ) -> Tensor:
        config, attention = self.config, fused.layer.self_attn
        assert isinstance(attention, Attention), "a decoder layer's attention"
        head, kv_heads = config.head_dim, config.num_kv_heads
        projected = functional.linear(fused.layer.input_layernorm(x), fused.qkv, fused.qkv_bias)
        parts = projected.view(self.slots, 1, -1, head).transpose(1, 2)  # [slots, heads + 2 kv_heads, 1, head_dim]
        queries, keys, values = parts.split((config.num_heads, kv_heads, kv_heads), dim=1)
        queries = rotate(attention.q_norm(queries), *tables) * head**-0.5
        keys = rotate(attention.k_norm(keys), *tables)
        mixed = []
        for place in places:
            group = place.group
            all_keys = group.caches[index].view(-1, group.window, head)  # [slots * kv_heads, window, head_dim]
            all_values = group.caches[len(self._layers) + index].view(-1, group.window, head)
            all_keys.view(-1, head).index_copy_(0, place.written, keys[group.slots].reshape(-1, head))
            all_values.view(-1, head).index_copy_(0, place.written, values[group.slots].reshape(-1, head))
            # The query heads of one key head as rows of one product: each key is read once, several times faster on a
            # CPU than scaled_dot_product_attention. Contiguous caches matter: bmm copies any other.
            grouped = queries[group.slots].reshape(len(all_keys), -1, head)
            scores = torch.bmm(grouped, all_keys.transpose(1, 2)) + place.mask
            mixed.append(torch.bmm(torch.softmax(scores, dim=-1), all_values))
        return attention.o_proj(torch.cat(mixed).view(self.slots, -1))


def _view(memory: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


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
