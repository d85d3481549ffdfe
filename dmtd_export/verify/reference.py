"""The PyTorch side of a verification: expected numbers of a scenario and logits of whole sequences, a layer in memory
at a time.

The only module of the package that imports torch, and it is imported only when torch is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmtd_export.bundle.weights import NUMPY_DTYPES
from dmtd_export.verify.int8_caches import Rounding
from dmtd_export.verify.scenario import Outcome, Scenario
from dmtd_export.verify.stored import stored_weight
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.checkpoints.tensors import tensor_shapes
from dmtd_models.config.model import DmtdSpec, ModelConfig
from dmtd_models.reference.dmtd import StoreAt, StreamedModel
from dmtd_models.reference.layers import rotary
from dmtd_models.reference.oracle import gates
from dmtd_runtime.bundle.manifest import Manifest

Array = np.ndarray[Any, np.dtype[Any]]
OnRead = Callable[[], None]


class Reference:
    """The oracle over a checkpoint's weights as the bundle stores them (cast to its type), or over the bundle's own.

    Quantised weights are the bundle's own.
    """

    def __init__(
        self, config: ModelConfig, spec: DmtdSpec, directory: Path, manifest: Manifest, checkpoint: Checkpoint | None
    ) -> None:
        self.config = config
        stored = NUMPY_DTYPES[manifest.model.dtype]

        self._on_read: OnRead = lambda: None

        def read(name: str) -> Array:
            self._on_read()
            if checkpoint is None or name in manifest.quantised:
                return stored_weight(directory, manifest, name)
            return checkpoint.read(name).astype(stored, copy=False)

        # float64, so that the error shown is the graph's own and not the reference's as well
        self._model = StreamedModel(config, spec, read, torch.float64)

    @property
    def reads(self) -> int:
        """How many weights a pass reads: each once, and a tied embedding as lm_head too."""
        return len(tensor_shapes(self.config)) + self.config.tie_word_embeddings

    def outcome(self, scenario: Scenario, on_read: OnRead = lambda: None, rounding: Rounding | None = None) -> Outcome:
        """Everything that the rows of a scenario compute. ``on_read`` is called before a weight is read.

        ``rounding``: of keys and values, where caches are int8; keys and values are then as the caches give them back.
        """
        self._on_read = on_read
        positions = torch.arange(scenario.ids.shape[1])[None].expand(len(scenario.lengths), -1)
        run = self._model(
            torch.from_numpy(scenario.ids),
            positions,
            torch.from_numpy(scenario.gate_hidden),
            torch.from_numpy(scenario.gate_thought),
            _store(rounding),
        )
        pairs = (("key", run.keys), ("value", run.values))
        caches = {(layer, kind): x.numpy() for kind, layers in pairs for layer, x in enumerate(layers)}
        return Outcome(thought=run.thought.numpy(), logits=run.logits.numpy(), caches=caches)

    def teacher_forced(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lens: Sequence[int],
        plain: Sequence[bool],
        heads: Sequence[Collection[int] | None],
        on_read: OnRead = lambda: None,
        rounding: Rounding | None = None,
    ) -> list[Array]:
        """Logits [n, vocab] of whole sequences under the oracle's gates, in one pass (causal: padding is harmless)."""
        self._on_read = on_read
        n = max(map(len, sequences))
        ids = torch.zeros((len(sequences), n), dtype=torch.int64)
        both = torch.ones((2, len(sequences), n), dtype=torch.int64)
        each = zip(sequences, prompt_lens, plain, heads, strict=True)
        for row, (sequence, prompt_len, is_plain, listed) in enumerate(each):
            ids[row, : len(sequence)] = torch.tensor(list(sequence))
            pair = gates(self._model.spec, prompt_len=prompt_len, total_len=len(sequence), plain=is_plain, heads=listed)
            for gate, values in zip(both, pair, strict=True):
                gate[row, : len(sequence)] = torch.from_numpy(values)
        run = self._model(ids, torch.arange(n)[None].expand(len(sequences), -1), both[0], both[1], _store(rounding))
        return [run.logits[row, : len(sequence)].numpy() for row, sequence in enumerate(sequences)]

    def rotary_tables(self, rows: int) -> tuple[Array, Array]:
        """Cosines and sines [rows, head_dim / 2] as the reference computes them."""
        cos, sin = rotary(self.config.rope, self.config.head_dim, torch.arange(rows)[None], torch.float32)
        return cos[0].numpy(), sin[0].numpy()


def _store(rounding: Rounding | None) -> StoreAt | None:
    if rounding is None:
        return None
    return lambda layer, kind, x: torch.from_numpy(rounding(layer, kind, x.numpy()))
