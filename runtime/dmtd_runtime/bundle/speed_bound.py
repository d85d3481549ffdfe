"""What the bytes allow: weights and KV read for a token in plain mode and in a DMTD cycle, and the ratio of the two.

Pure arithmetic over the manifest, used by ``inspect`` and ``bench``. A decode step at a small batch takes as long as its
reads, so the ratio of the bytes bounds the speed-up:

    bound = tau * (W(all) + KV(all)) / (W(T) + KV(T) + tau * (W(E, D, lm_head) + KV(E, D)))

1. T's weights and cache are read once a cycle (the refill and the head are one run), everything else in every step.
2. The final norm counts with lm_head. A tied embedding is read as lm_head; a look-up in the embedding reads one row
   and counts as nothing, and so do the rotary tables.
3. E counts once a step. A staged full pass reads it a second time at a head, which the bound does not forgive.
4. Every sequence of a batch reads a cache of its own; the weights are read once for all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dmtd_runtime.bundle.manifest import DTYPE_BYTES, CycleInfo, Manifest

EMBEDDING_NAME, LM_HEAD_NAME, NORM_NAME = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitBytes:
    """Bytes of a split model.

    ``lm_head`` includes the final norm, and where tied is the embedding; ``embedding`` is the table that is looked up, and
    the same bytes as lm_head's where ``tied``. ``kv_row_bytes`` is one layer's key and value for one position.
    """

    embedding: int
    encoding: int
    thinking: int
    decoding: int
    lm_head: int
    tied: bool
    num_layers: tuple[int, int, int]  # of E, T, D
    kv_row_bytes: int
    cycle_length: int

    @property
    def stored(self) -> int:
        """Bytes of all weights, a tied tensor once."""
        return self.layers + self.lm_head + (0 if self.tied else self.embedding)

    @property
    def layers(self) -> int:
        """Bytes of all layers."""
        return self.encoding + self.thinking + self.decoding

    @property
    def fused_extra(self) -> int:
        """Bytes that a fused full pass holds twice: its graph repeats the late layers and lm_head."""
        return self.decoding + self.lm_head

    def kv_per_token(self) -> int:
        """Bytes of one position in all layers' caches."""
        return sum(self.num_layers) * self.kv_row_bytes

    def plain_step(self, context: float, batch: int = 1) -> float:
        """Bytes read by one plain decode step of ``batch`` sequences with ``context`` positions each."""
        return self.layers + self.lm_head + batch * context * self.kv_per_token()

    def cycle(self, context: float, batch: int = 1) -> float:
        """Bytes read by one whole DMTD cycle: a head with its refill, then the late steps."""
        encoding, thinking, decoding = (count * self.kv_row_bytes * batch * context for count in self.num_layers)
        every_step = self.encoding + self.decoding + self.lm_head + encoding + decoding
        return self.thinking + thinking + self.cycle_length * every_step

    def bound(self, context: float, batch: int = 1) -> float:
        """How many times faster than plain decoding the bytes allow DMTD to be."""
        return self.cycle_length * self.plain_step(context, batch) / self.cycle(context, batch)


def group_of(name: str, cycle: CycleInfo) -> str | None:
    """The group that a stored tensor belongs to: encoding, thinking, decoding, lm_head or embedding; None for the tables."""
    if (found := _LAYER.match(name)) is not None:
        return next(g for g in ("encoding", "thinking", "decoding") if int(found[1]) in getattr(cycle, f"{g}_range"))
    groups = {EMBEDDING_NAME: "embedding", LM_HEAD_NAME: "lm_head", NORM_NAME: "lm_head"}
    return groups.get(f"{name.rpartition('.')[0]}.weight")


def weight_formats(manifest: Manifest) -> dict[str, str]:
    """How the matrices of each group are stored, in words; a group has several formats where a checkpoint's were kept."""
    names = {part: fmt.name for weight, fmt in manifest.quantised.items() for part in manifest.parts_of(weight)}
    found: dict[str, list[str]] = {}
    for name, info in manifest.weights.items():
        group = group_of(name, manifest.cycle)
        if group is not None and len(info.shape) > 1:
            stored = names.get(name, info.dtype)
            if stored not in found.setdefault(group, []):
                found[group].append(stored)
    if "lm_head" not in found and "embedding" in found:  # tied
        found["lm_head"] = found["embedding"]
    return {group: ", ".join(formats) for group, formats in found.items()}


def matrices(manifest: Manifest) -> Iterator[tuple[str, str, int]]:
    """(name, group, values) of every matrix, quantised or not; see :func:`group_of`."""
    for name in sorted({*manifest.quantised, *(name for name in manifest.weights if name.endswith(".weight"))}):
        group, shape = group_of(name, manifest.cycle), manifest.shape_of(name)
        if group is not None and shape is not None and len(shape) == 2:
            yield name, group, math.prod(shape)


def weight_bits(manifest: Manifest) -> dict[str, float]:
    """Bits a weight that each group's matrices are stored in, with their scales, minimums and factors."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, group, count in matrices(manifest):
        found.setdefault(group, []).append((manifest.bytes_of(name), count))
    bits = {group: 8 * sum(b for b, _ in sizes) / sum(n for _, n in sizes) for group, sizes in found.items()}
    return bits if "lm_head" in bits or "embedding" not in bits else {**bits, "lm_head": bits["embedding"]}  # tied


def split_bytes(manifest: Manifest) -> SplitBytes:
    """The bytes of a bundle's groups, from the tensors that its manifest lists."""
    cycle, model = manifest.cycle, manifest.model
    groups = {"encoding": 0, "thinking": 0, "decoding": 0}
    for name, info in manifest.weights.items():
        group = group_of(name, cycle)
        if group in groups:
            groups[group] += info.length
    embedding, lm_head = manifest.bytes_of(EMBEDDING_NAME), manifest.bytes_of(LM_HEAD_NAME)
    return SplitBytes(
        embedding=embedding,
        encoding=groups["encoding"],
        thinking=groups["thinking"],
        decoding=groups["decoding"],
        lm_head=(lm_head or embedding) + manifest.bytes_of(NORM_NAME),
        tied=not lm_head,
        num_layers=(cycle.encoding_layers, cycle.thinking_layers, cycle.decoding_layers),
        kv_row_bytes=2 * model.num_kv_heads * model.head_dim * DTYPE_BYTES[model.cache_dtype],
        cycle_length=cycle.cycle_length,
    )


def mean_context(prompt_len: int, num_tokens: int) -> float:
    """Positions that a decode step sees on average while ``num_tokens`` are generated: steps feed positions
    prompt_len .. prompt_len + num_tokens - 2, and a step at position c reads c + 1 rows.
    """
    return prompt_len + num_tokens / 2
