"""Keys and values as int8 caches give them back, for a reference that follows the codes which graphs wrote.

A value x of a channel with scale s is kept as a code, the nearest integer to x / s within -128 and 127. A reference in
float64 and a graph in float32 differ a little in x, so where x / s lies at the border between two codes they may round apart by
a whole step, and all that is computed from there on with them. Such a **tie** is nobody's fault. So the reference takes the
graph's code where x lies that close to the border: as close as the graph's margin, float32's or that of rounded inputs, lets
keys and values themselves be wrong. Any other code it takes for a fault, and goes on with its own; so the difference shows, and
nothing else needs a wider margin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.bundle.weights import map_tensor
from dmtd_export.verify.margins import FLOAT32_MARGIN
from dmtd_export.verify.scenario import Outcome
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest

Array = np.ndarray[Any, np.dtype[Any]]
Scales = Mapping[tuple[int, str], Array]  # by layer and kind, float32 [kv_heads, 1, head_dim]
Codes = Mapping[tuple[int, str], Array]  # by layer and kind, int8 [sequences, kv_heads, n, head_dim]
LOWEST, HIGHEST = -128, 127


def cache_scales(directory: Path, manifest: Manifest) -> Scales:
    """The scales of a bundle's int8 caches; none where caches have the model's type."""
    model = manifest.model
    if model.cache_dtype != "int8":
        return {}
    shape, path = (model.num_kv_heads, 1, model.head_dim), directory / contract.WEIGHTS_FILE
    return {
        (layer, kind): np.array(map_tensor(path, manifest.weights[contract.kv_scale(layer, kind)])).reshape(shape)
        for layer in range(model.num_layers)
        for kind in contract.KINDS
    }


class Rounding:
    """Rounds keys and values, and counts: how many there were, and of them ties and those beyond the range of codes."""

    def __init__(self, scales: Scales, codes: Codes, share: float = FLOAT32_MARGIN) -> None:
        """``codes``: what graphs wrote; a layer that is not among them is rounded to the nearest.

        ``share``: of the largest value, how wrong a value may be.
        """
        self._scales, self._codes, self._share = scales, codes, share
        self.values = self.ties = self.saturated = 0

    def __call__(self, layer: int, kind: str, x: Array) -> Array:
        """What the cache gives back for ``x`` float64 [sequences, kv_heads, n, head_dim]."""
        scale = self._scales[layer, kind].astype(np.float64)
        steps = x / scale
        inside = np.clip(steps, LOWEST, HIGHEST)
        own = np.rint(inside)
        self.values += x.size
        self.saturated += int((np.abs(steps) > HIGHEST + 0.5).sum())
        given = self._codes.get((layer, kind))
        if given is None:
            return own * scale
        slack = self._share * np.abs(x).max() / scale
        ties = (given != own) & (np.abs(inside - given) <= 0.5 + slack)
        self.ties += int(ties.sum())
        found: Array = np.where(ties, given, own) * scale
        return found


def told_of(roundings: Sequence[Rounding]) -> str:
    """What a report says of them."""
    values, ties, saturated = (sum(getattr(one, name) for one in roundings) for name in ("values", "ties", "saturated"))
    return f"int8 caches: of {values} values {ties} at a rounding's border, {saturated} saturated"


class FollowedGraphs:
    """What a scenario computes with the codes that a graph wrote, made anew only where they are others than before."""

    def __init__(
        self, outcome: Callable[[Rounding], Outcome], scales: Scales, first: Codes, share: float = FLOAT32_MARGIN
    ) -> None:
        """``outcome``: the reference's; ``first``: codes of T's layers, which D's rows come from where a graph has none."""
        self._outcome, self._scales, self._first, self._share = outcome, scales, first, share
        self._known: dict[str, tuple[Outcome, str]] = {}

    def within(self, share: float) -> FollowedGraphs:
        """The same for graphs that are wrong by up to a share of the largest value."""
        return FollowedGraphs(self._outcome, self._scales, self._first, share)

    def __call__(self, codes: Codes) -> tuple[Outcome, str]:
        """The outcome, and a line about its rounding."""
        merged = {**self._first, **codes}
        digest = hashlib.sha256()
        for key in sorted(merged):
            digest.update(f"{key}".encode() + merged[key].tobytes())
        if (found := self._known.get(digest.hexdigest())) is None:
            rounding = Rounding(self._scales, merged, self._share)
            outcome = self._outcome(rounding)
            found = self._known[digest.hexdigest()] = outcome, told_of([rounding])
        return found


class FollowedCycles:
    """Logits of whole sequences with the codes that stand in caches once they have run; see :class:`FollowedGraphs`.

    Codes of a sequence are int8 [2 * layers, kv_heads, rows, head_dim], keys and values of a layer in turn.
    """

    def __init__(
        self,
        logits: Callable[[Sequence[int], Rounding], list[Array]],
        scales: Scales,
        share: float = FLOAT32_MARGIN,
    ) -> None:
        """``logits``: the reference's of some cases."""
        self._logits, self._scales, self._share = logits, scales, share
        self._known: dict[tuple[int, bytes], Array] = {}
        self._ran: list[Rounding] = []

    def within(self, share: float) -> FollowedCycles:
        """The same for cycles that are wrong by up to a share of the largest value."""
        return FollowedCycles(self._logits, self._scales, share)

    def __call__(self, cases: Sequence[int], given: Sequence[Array | None]) -> tuple[list[Array], str]:
        """Logits of some cases, by their numbers, and a line about the rounding of all that ran so far."""
        codes = [own for own in given if own is not None]
        keys = [(case, hashlib.sha256(own.tobytes()).digest()) for case, own in zip(cases, codes, strict=True)]
        new = [index for index, key in enumerate(keys) if key not in self._known]
        if new:
            rounding = Rounding(self._scales, self._together([codes[index] for index in new]), self._share)
            made = self._logits([cases[index] for index in new], rounding)
            self._known |= {keys[index]: rows for index, rows in zip(new, made, strict=True)}
            self._ran.append(rounding)
        return [self._known[key] for key in keys], told_of(self._ran)

    def _together(self, codes: Sequence[Array]) -> Codes:
        """The codes of several sequences, those of the shorter ones with zeros behind them."""
        longest = max(own.shape[2] for own in codes)
        padded = np.stack([np.pad(own, ((0, 0), (0, 0), (0, longest - own.shape[2]), (0, 0))) for own in codes])
        keys = sorted(
            self._scales, key=lambda key: (key[0], contract.KINDS.index("key" if key[1] == "key" else "value"))
        )
        return {key: padded[:, index] for index, key in enumerate(keys)}
