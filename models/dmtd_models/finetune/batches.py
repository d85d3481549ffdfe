"""From documents to the tensors of a training step: which rows are heads, which carry loss, what they should predict.

Stands between the text (a data set with ``input_ids`` and ``prompt_len``) and ``student``. Every document is a sequence of
its own: its positions and its phase begin anew, wherever it lies in the packed row. Gates come from ``oracle.gates``.

Cycles have the spec's length, or lengths drawn up to it (``cycle_lengths``).

A batch of n packed rows, of which r carry loss:

    input_ids, positions, gate_hidden, gate_thought    int64 [n]
    starts                                             int64 [documents + 1]
    loss_rows                                          int64 [r], the rows whose next token is learnt
    labels                                             int64 [r], that token
    phase                                              int64 [r], place in the cycle (0 is a head), -1 for a prompt's row
    rows                                               int64 [n], places in the data set's stored features (``features``)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmtd_models.config.model import DmtdSpec
from dmtd_models.finetune.options import BatchOptions
from dmtd_models.reference.oracle import gates

Ints = npt.NDArray[np.int64]
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text: its tokens, and how many of them are the prompt (0 for free text)."""

    token_ids: Ints  # [n], n >= 2
    prompt_len: int
    first_row: int = 0  # place of its first token among all tokens of the data set


class Documents(Protocol):
    """What the training set is read through; ``datasets.Dataset`` behind it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


def pack(lengths: Sequence[int], row_len: int, seed: int) -> list[list[int]]:
    """Fill rows of at most ``row_len`` tokens with whole documents in a seeded random order; first fit over open rows."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    open_rows: list[tuple[int, list[int]]] = []
    rows: list[list[int]] = []
    for index in order.tolist():
        length = lengths[index]
        assert length <= row_len, "documents are cut to the row's length when they are read"
        for place, (used, row) in enumerate(open_rows):
            if used + length <= row_len:
                row.append(index)
                open_rows[place] = (used + length, row)
                break
        else:
            rows.append([index])
            open_rows.append((length, rows[-1]))
        open_rows = [entry for entry in open_rows if entry[0] < row_len - _SMALLEST_DOCUMENT][-_OPEN_ROWS:]
    return rows


_OPEN_ROWS = 64
_SMALLEST_DOCUMENT = 8  # a row with less room than this is closed


def make_batch(documents: Sequence[Document], spec: DmtdSpec, options: BatchOptions, rng: np.random.Generator) -> Batch:
    """Lay documents one behind another; see the module's table. ``rng`` moves phases where ``options`` asks for it."""
    assert documents, "a batch has at least one document"
    parts = [_document_rows(document, spec, options, rng) for document in documents]
    lengths = [len(document.token_ids) for document in documents]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    loss_rows = [part.loss_rows + start for part, start in zip(parts, starts[:-1], strict=True)]
    columns: dict[str, Sequence[Ints]] = {
        "input_ids": [document.token_ids for document in documents],
        "positions": [np.arange(length) for length in lengths],
        "gate_hidden": [part.gate_hidden for part in parts],
        "gate_thought": [part.gate_thought for part in parts],
        "loss_rows": loss_rows,
        "labels": [document.token_ids[part.loss_rows + 1] for document, part in zip(documents, parts, strict=True)],
        "phase": [part.phase[part.loss_rows] for part in parts],
        "rows": [document.first_row + np.arange(length) for document, length in zip(documents, lengths, strict=True)],
    }
    batch = {name: torch.from_numpy(np.concatenate(values).astype(np.int64)) for name, values in columns.items()}
    batch["starts"] = torch.from_numpy(starts.astype(np.int64))
    return batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    gate_hidden: Ints  # [n]
    gate_thought: Ints  # [n]
    phase: Ints  # [n]
    loss_rows: Ints  # [r]


def _document_rows(document: Document, spec: DmtdSpec, options: BatchOptions, rng: np.random.Generator) -> _Rows:
    total = len(document.token_ids)
    prompt_len = document.prompt_len
    first_learnt = max(prompt_len - 1, 0)
    if spec.cycle_origin == "prompt":
        if prompt_len == 0:
            # Free text has no prompt: a random part of it stands for one.
            prompt_len = int(rng.integers(1, max(2, total // 2)))
            first_learnt = 0 if options.learn_prompt else prompt_len - 1
        if options.vary_phase:
            prompt_len = min(prompt_len + int(rng.integers(spec.cycle_length)), total - 1)
    if options.learn_prompt:
        first_learnt = 0
    heads = drawn_heads(spec, prompt_len, total, rng) if options.cycle_lengths == "varied" else None
    gate_hidden, gate_thought = gates(spec, prompt_len=prompt_len, total_len=total, heads=heads)
    return _Rows(
        gate_hidden=gate_hidden,
        gate_thought=gate_thought,
        phase=phases(spec, prompt_len, total) if heads is None else phases_behind(heads, total),
        loss_rows=np.arange(first_learnt, total - 1),
    )


def phases(spec: DmtdSpec, prompt_len: int, total_len: int) -> Ints:
    """Each position's place in its cycle, int64 [total_len]; -1 where it is prompt."""
    positions = np.arange(total_len)
    if spec.cycle_origin == "absolute":
        return positions % spec.cycle_length
    return np.where(positions < prompt_len, -1, (positions - prompt_len) % spec.cycle_length)


def drawn_heads(spec: DmtdSpec, prompt_len: int, total_len: int, rng: np.random.Generator) -> list[int]:
    """Heads of cycles whose lengths are drawn evenly from 1 .. ``cycle_length``, from the first generated position on."""
    heads = np.cumsum([prompt_len, *rng.integers(1, spec.cycle_length + 1, total_len - prompt_len)])
    return [head for head in heads.tolist() if head < total_len]


def phases_behind(heads: Sequence[int], total_len: int) -> Ints:
    """Each position's distance from the last of ``heads`` up to it, int64 [total_len]; -1 before the first."""
    positions = np.arange(total_len)
    last = np.searchsorted(heads, positions, side="right") - 1
    return np.where(last < 0, -1, positions - np.asarray(heads)[np.maximum(last, 0)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Documents that a step takes together, and what its random choices hang on."""

    epoch: int
    index: int
    documents: list[Document]


class PackedRows(torch.utils.data.Dataset[Row]):
    """Documents in packed rows. The order of rows is the loader's business; phases move with ``set_epoch``."""

    def __init__(self, documents: Documents, rows: Sequence[Sequence[int]]) -> None:
        self._documents = documents
        self._rows = rows
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader at the start of each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return Row(epoch=self._epoch, index=index, documents=[self._documents[place] for place in self._rows[index]])


class Collator:
    """Makes batches of packed rows; the cycle length may change while training goes on (a curriculum)."""

    def __init__(
        self,
        spec: DmtdSpec,
        options: BatchOptions,
        seed: int,
        add_features: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.spec = spec
        self._options = options
        self._seed = seed
        self._add_features = add_features

    def set_cycle_length(self, cycle_length: int) -> None:
        """Batches made from now on have cycles of ``cycle_length``."""
        self.spec = replace(self.spec, cycle_length=cycle_length)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """One batch of all ``rows``. Made again in the same epoch, after a restart say, a row has the same phases."""
        rng = np.random.default_rng([self._seed, rows[0].epoch, rows[0].index])
        documents = [document for row in rows for document in row.documents]
        batch = make_batch(documents, self.spec, self._options, rng)
        self._add_features(batch)
        return batch
