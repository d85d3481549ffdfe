"""Matrices rounded over a calibration text: the reference runs it layer by layer, and what it feeds each matrix is
what the matrix is rounded with.

    checkpoint, text --> reference, a layer at a time --> inputs of a matrix --> codes on disk --> weights file

Matrices of 4 bits by ``compensation``; those of int8-channel take the inputs' factors from it.

1. All of the text goes through a layer before the next one is read, and through matrices that are rounded already: each takes up
   what those before it lost.
2. The model runs as it will be used: weights that were trained for it in cycles, heads and late steps behind a prompt, which
   decide what D reads; all others plainly.
3. Matrices that see the same inputs (q, k and v; gate and up) share their moments. lm_head's are those of the last norm's output;
   a tied embedding is rounded as lm_head and looked up as floats here. An embedding of its own, whose inputs are no numbers, is
   not rounded here.

In memory at a time: one layer in float32, the text's activations of one layer, and the moments of its widest matrix, in float64
while they are inverted. Needs torch.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmtd_export.bundle.calibration import CalibrationText
from dmtd_export.bundle.compensation import compensated, inverse_factor
from dmtd_export.bundle.quantise import Quantisation
from dmtd_export.bundle.rounding import input_factors, rounded_by_channel
from dmtd_export.errors import ExportError
from dmtd_models.checkpoints.blocks import BlockWeight
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.checkpoints.tensors import EMBEDDING, LM_HEAD, layer_prefix
from dmtd_models.config.model import DmtdSpec
from dmtd_models.progress import Progress, counter
from dmtd_models.reference.dmtd import StreamedModel
from dmtd_models.reference.layers import DecoderLayer
from dmtd_models.reference.oracle import gates

# What reads the same inputs, by the module whose call shows them.
TOGETHER = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


class RoundedMatrices:
    """Rounded matrices by name, in files of a directory: all of them would not fit into memory."""

    def __init__(self, place: Path) -> None:
        """``place``: an empty directory."""
        self._place = place

    def put(self, name: str, weight: BlockWeight) -> None:
        """Keep a matrix."""
        packed = weight.codes[:, 0::2] | weight.codes[:, 1::2] << np.uint8(4) if weight.bits == 4 else weight.codes
        parts: dict[str, Any] = {"bits": weight.bits, "block": weight.block, "source": weight.source, "packed": packed}
        rest: dict[str, Any] = {"scales": weight.scales, "minimums": weight.minimums, "factors": weight.factors}
        np.savez(self._file(name), **parts, **{kind: array for kind, array in rest.items() if array is not None})

    def blocks(self, name: str) -> BlockWeight | None:
        """A matrix that was kept; None for all others."""
        if not self._file(name).is_file():
            return None
        with np.load(self._file(name)) as kept:
            codes = kept["packed"]
            if int(kept["bits"]) == 4:
                codes = np.stack((codes % 16, codes // 16), axis=-1).reshape(len(codes), -1)
            return BlockWeight(
                codes=codes,
                bits=int(kept["bits"]),
                block=int(kept["block"]),
                scales=kept["scales"],
                minimums=kept.get("minimums"),
                factors=kept.get("factors"),
                source=str(kept["source"]),
            )

    def _file(self, name: str) -> Path:
        return self._place / f"{name}.npz"


@contextlib.contextmanager
def rounded_over(
    text: CalibrationText,
    checkpoint: Checkpoint,
    spec: DmtdSpec,
    quantisation: Quantisation,
    place: Path,
    progress: Progress,
) -> Iterator[RoundedMatrices]:
    """The matrices that ``quantisation`` rounds over a text, so rounded, while the context lasts.

    Args:
        text: what the model reads.
        checkpoint: the model.
        spec: its split and convention.
        quantisation: the format of every matrix.
        place: a directory that they are kept in meanwhile.
        progress: is told of layers; lm_head counts as one.

    Raises:
        ExportError: the model computes values that are not finite.
    """
    with tempfile.TemporaryDirectory(dir=place) as directory:
        kept = RoundedMatrices(Path(directory))
        model = _RoundingModel(checkpoint, spec, quantisation, kept, progress)
        with _one_thread():
            model.read_text(text)
        yield kept


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Nearly all of it are small operations: threads that wait for each other gain little, and beside other work cost many
    times as much.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _RoundingModel(StreamedModel):
    """The streamed reference, whose matrices are rounded as their inputs come by."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DmtdSpec,
        quantisation: Quantisation,
        kept: RoundedMatrices,
        progress: Progress,
    ) -> None:
        super().__init__(checkpoint.config, spec, checkpoint.read, torch.float32)
        self._checkpoint = checkpoint
        self._quantisation = quantisation
        self._kept = kept
        self._done = counter(progress, "rounding", checkpoint.config.num_layers + 1)
        self._in_text = torch.zeros(0, dtype=torch.bool)  # [sequences x tokens], False where one is filled up

    def read_text(self, text: CalibrationText) -> None:
        """Run all of it once."""
        count, longest = len(text.sequences), max(len(each.token_ids) for each in text.sequences)
        ids, gate_hidden, gate_thought = torch.zeros(3, count, longest, dtype=torch.int64)
        in_text = torch.zeros(count, longest, dtype=torch.bool)
        for row, each in enumerate(text.sequences):
            length = len(each.token_ids)
            hidden, thought = gates(
                self.spec, prompt_len=each.prompt_len, total_len=length, plain=not self.spec.trained
            )
            ids[row, :length] = torch.tensor(each.token_ids)
            gate_hidden[row, :length], gate_thought[row, :length] = map(torch.from_numpy, (hidden, thought))
            in_text[row, :length] = True
        self._in_text = in_text.flatten()
        self(ids, torch.arange(longest).expand(count, -1), gate_hidden, gate_thought)

    def layer(self, index: int) -> DecoderLayer:
        """A layer that rounds its matrices when it is called, and forgets its keys and values."""
        layer = super().layer(index)
        for first, names in TOGETHER.items():
            modules = {f"{layer_prefix(index)}{name}.weight": layer.get_submodule(name) for name in names}
            layer.get_submodule(first).register_forward_pre_hook(partial(self._see, modules))
        layer.register_forward_hook(self._leave)
        return layer

    def head(self, x: Tensor) -> Tensor:
        """Round lm_head; there are no logits."""
        name = EMBEDDING if self.config.tie_word_embeddings else LM_HEAD
        if self._takes(name):
            self._round({name: self._checkpoint.read(name)}, self._moments(self.normed(x), name))
        self._done(1)
        return x.new_empty(0)

    def _leave(self, module: nn.Module, inputs: object, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        del module, inputs
        self._done(1)
        return out[0], out[1].new_empty(0), out[2].new_empty(0)

    def _see(self, modules: dict[str, nn.Module], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Round what is about to be multiplied by these inputs [sequences, tokens, in]."""
        del module
        weights: dict[str, Tensor] = {}
        for name, each in modules.items():
            assert isinstance(each.weight, Tensor), "linear modules have a weight"
            if self._takes(name):
                weights[name] = each.weight
        if not weights:
            return
        values = {name: weight.detach().numpy() for name, weight in weights.items()}
        for name, made in self._round(values, self._moments(inputs[0], next(iter(weights)))).items():
            weights[name].data = torch.from_numpy(made.dequantised())

    def _takes(self, name: str) -> bool:
        return self._quantisation.over_text(name)

    def _round(self, weights: Mapping[str, np.ndarray], moments: Tensor) -> dict[str, BlockWeight]:
        """Round and keep matrices of the same inputs, which are of one format."""
        [fmt] = {self._quantisation.formats[name] for name in weights}
        if fmt == "int8-channel":
            factors = input_factors([*weights.values()], moments.diagonal().sqrt().numpy())
            made = {name: rounded_by_channel(weight, factors) for name, weight in weights.items()}
        else:
            factor = inverse_factor(moments, int(self._in_text.sum()))
            block, symmetric = self._quantisation.block, fmt == "int4-symmetric"
            made = {name: compensated(each, factor, block, symmetric=symmetric) for name, each in weights.items()}
        for name, weight in made.items():
            self._kept.put(name, weight)
        return made

    def _moments(self, inputs: Tensor, name: str) -> Tensor:
        rows = inputs.flatten(0, -2)[self._in_text]
        moments = rows.T @ rows / len(rows)
        if not bool(moments.isfinite().all()):
            raise ExportError(
                f"the inputs of {name} are not finite over the calibration text: the checkpoint is damaged; export it without "
                "--calibration, and dmtd verify names the tensor",
                param="calibration",
            )
        return moments
