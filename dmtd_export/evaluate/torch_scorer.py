"""Scores from a PyTorch checkpoint: whole sequences under the oracle's gates, no cache.

A sequence asked for in both modes (or with several prompt lengths) passes E and T once: only D differs. Sequences of
similar length share a batch, padded on the right, which causal attention never sees. lm_head runs over a chunk of rows at
a time, so that memory does not grow with the vocabulary. One of the package's modules that import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from dmtd_export.bundle.split import cycle_of, spec_of
from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.scorer import ScoreRequest, TokenScores, check_request
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.config.model import DmtdSpec
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.layers import rotary
from dmtd_models.reference.oracle import gates
from dmtd_runtime.bundle.manifest import CycleInfo

TorchDtype = Literal["float32", "bfloat16", "float64"]
BATCH_TOKENS = 2048  # of one pass; more gains nothing on a CPU and costs memory
HEAD_BYTES = 64 << 20  # float32 logits held at a time


class TorchScorer:
    """See :class:`dmtd_export.evaluate.scorer.Scorer`."""

    batch_hint = 16

    def __init__(self, model: DmtdModel, cycle: CycleInfo) -> None:
        """``model`` is in evaluation mode on its device; ``cycle`` replaces the convention of ``model.spec``."""
        self._model = model
        self.cycle = cycle
        self.vocab_size = model.config.vocab_size
        self.max_len = model.config.max_positions
        self._spec = spec_of(cycle)

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, spec: DmtdSpec, *, dtype: TorchDtype = "float32", device: str = "cpu"
    ) -> TorchScorer:
        """Read the weights of ``checkpoint``.

        Raises:
            EvaluateError: ``device`` is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise EvaluateError(
                "got cuda, but this PyTorch sees no GPU; use cpu, or install torch's CUDA build", param="device"
            )
        model = DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, getattr(torch, dtype))
        return cls(model.to(device), cycle_of(spec))

    def with_convention(self, cycle: CycleInfo) -> TorchScorer:
        """The same weights under another convention."""
        return TorchScorer(self._model, cycle)

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """See the protocol."""
        for request in requests:
            check_request(request, self.max_len, self.vocab_size)
        variants: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            variants.setdefault(request.token_ids, []).append(index)
        results: dict[int, TokenScores] = {}
        for batch in _batches(sorted(variants, key=len)):
            with torch.inference_mode():
                self._score_batch(batch, [variants[ids] for ids in batch], requests, results)
        return [results[i] for i in range(len(requests))]

    def close(self) -> None:
        """Nothing to free but memory, which goes with the object."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score_batch(
        self,
        batch: Sequence[tuple[int, ...]],
        variants: Sequence[Sequence[int]],
        requests: Sequence[ScoreRequest],
        results: dict[int, TokenScores],
    ) -> None:
        """E and T once over the batch, then D once for every request of it."""
        model, spec, device = self._model.model, self._spec, self._model.model.norm.weight.device
        n = len(batch[-1])
        ids = torch.zeros((len(batch), n), dtype=torch.int64)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        hidden = model.embed_tokens(ids.to(device))
        tables = rotary(
            self._model.config.rope, self._model.config.head_dim, torch.arange(n, device=device)[None], hidden.dtype
        )
        middle, last = spec.encoding_layers + spec.thinking_layers, self._model.config.num_layers
        hidden = self._layers(hidden, range(spec.encoding_layers), tables)
        thought = self._layers(hidden, range(spec.encoding_layers, middle), tables)
        flat = [(row, index) for row, indices in enumerate(variants) for index in indices]
        width = max(1, len(batch))
        for start in range(0, len(flat), width):
            part = flat[start : start + width]
            rows = torch.tensor([row for row, _ in part], device=device)
            gate_hidden, gate_thought = self._gates([requests[index] for _, index in part], n)
            nothing = torch.zeros((), dtype=hidden.dtype, device=device)
            late = torch.where(gate_hidden.to(device), hidden[rows], nothing) + torch.where(
                gate_thought.to(device), thought[rows], nothing
            )
            late = self._layers(late, range(middle, last), tables)
            for at, (_, index) in enumerate(part):
                request = requests[index]
                results[index] = self._head(late[at, request.first_row : len(request.token_ids)], request)

    def _layers(self, x: Tensor, layers: range, tables: tuple[Tensor, Tensor]) -> Tensor:
        for index in layers:
            x, _, _ = self._model.model.layers[index](x, tables)
        return x

    def _gates(self, requests: Sequence[ScoreRequest], n: int) -> tuple[Tensor, Tensor]:
        """Both gates as bool [len(requests), n, 1]; padding rows are open."""
        table = np.ones((2, len(requests), n), dtype=bool)
        for row, r in enumerate(requests):
            length = len(r.token_ids)
            pair = gates(self._spec, prompt_len=r.prompt_len, total_len=length, plain=r.plain)
            for gate, values in zip(table, pair, strict=True):
                gate[row, :length] = values
        return torch.from_numpy(table[0])[..., None], torch.from_numpy(table[1])[..., None]

    def _head(self, states: Tensor, request: ScoreRequest) -> TokenScores:
        """Scores of the rows whose last states [rows, hidden] these are."""
        weight = (
            self._model.lm_head.weight if self._model.lm_head is not None else self._model.model.embed_tokens.weight
        )
        targets = torch.tensor([*request.token_ids[request.first_row + 1 :], 0], device=states.device)
        chunk = max(1, HEAD_BYTES // (4 * self.vocab_size))
        logprobs, top1 = [], []
        for start in range(0, len(states), chunk):
            wanted = targets[start : start + chunk]
            normed = self._model.model.norm(states[start : start + chunk])
            logits = torch.nn.functional.linear(normed, weight).to(torch.promote_types(normed.dtype, torch.float32))
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            logprobs.append((chosen - logits.logsumexp(-1)).double().cpu())
            top1.append(logits.argmax(-1).cpu())
        return TokenScores(
            target_logprobs=torch.cat(logprobs)[:-1].numpy().copy(), top1=torch.cat(top1).numpy().astype(np.int64)
        )


def _batches(sequences: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Neighbours in length together, at most BATCH_TOKENS padded tokens each (or one sequence)."""
    batches: list[list[tuple[int, ...]]] = []
    for ids in sequences:
        if batches and len(ids) * (len(batches[-1]) + 1) <= BATCH_TOKENS and len(ids) <= _slack(len(batches[-1][0])):
            batches[-1].append(ids)
        else:
            batches.append([ids])
    return batches


def _slack(shortest: int) -> int:
    """The longest sequence that may pad the shortest one of its batch."""
    return shortest + max(8, math.ceil(shortest / 4))


def use_threads(threads: int | None) -> None:
    """Let PyTorch compute with ``threads`` threads; None leaves its own choice."""
    if threads is not None:
        torch.set_num_threads(threads)
