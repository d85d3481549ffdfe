"""What frozen layers compute, stored once and read in every epoch: thoughts, and the plain model's likeliest tokens.

Where only late layers train, E and T and the whole plain model give the same numbers for a text each time. They are computed in
one pass over the data and kept in plain memory-mapped files, addressed by a token's place among all tokens of the data set:

    thought.bin        bfloat16 [tokens, hidden]       (if the trunk is frozen)
    target_ids.bin     int32 [tokens, k]
    target_logs.bin    float16 [tokens, k]             logarithms of probabilities at temperature 1
    features.json      what the numbers belong to, and how many tokens are done

The pass goes on where it was interrupted. Files of other weights or another text are refused by their key, and made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmtd_models.dmtd import DmtdModel
from dmtd_models.errors import ModelError
from dmtd_models.finetune.batches import Batch, Document, Documents
from dmtd_models.finetune.packed import make_layout
from dmtd_models.finetune.student import head_weight, likeliest_tokens, plain_rows, trunk

_RECORD = "features.json"
_SAVE_EVERY_TOKENS = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureKey:
    """What stored features belong to."""

    weights: str  # digest of the plain model's weights and configuration
    documents: str  # digest of all token ids
    trunk_layers: int
    top_k: int


class FeatureStore:
    """Stored features of one data set, read by place."""

    def __init__(
        self, directory: Path, tokens: int, hidden: int, top_k: int, with_thought: bool, mode: str = "r"
    ) -> None:
        self._thought = _open(directory / "thought.bin", np.int16, (tokens, hidden), mode) if with_thought else None
        self._ids = _open(directory / "target_ids.bin", np.int32, (tokens, top_k), mode)
        self._logs = _open(directory / "target_logs.bin", np.float16, (tokens, top_k), mode)

    def add_to(self, batch: Batch) -> None:
        """Put the features of a batch's rows into it: ``thought`` [n, hidden], ``target_ids``, ``target_log_probs`` [r, k]."""
        rows = batch["rows"].numpy()
        learnt = rows[batch["loss_rows"].numpy()]
        if self._thought is not None:
            batch["thought"] = torch.from_numpy(self._thought[rows]).view(torch.bfloat16)
        batch["target_ids"] = torch.from_numpy(self._ids[learnt].astype(np.int64))
        batch["target_log_probs"] = torch.from_numpy(self._logs[learnt].astype(np.float32))

    def write(self, first: int, thought: Tensor | None, ids: Tensor, logs: Tensor) -> None:
        """Store the rows from place ``first`` on."""
        rows = slice(first, first + len(ids))
        if self._thought is not None and thought is not None:
            self._thought[rows] = thought.to(torch.bfloat16).cpu().view(torch.int16).numpy()
        self._ids[rows] = ids.cpu().numpy()
        self._logs[rows] = logs.cpu().clamp(min=-6e4).numpy()

    def flush(self) -> None:
        """Let the files hold what was written."""
        for array in (self._thought, self._ids, self._logs):
            if isinstance(array, np.memmap):
                array.flush()


def needed_bytes(tokens: int, hidden: int, top_k: int, with_thought: bool) -> int:
    """Size of the files."""
    return tokens * ((2 * hidden if with_thought else 0) + 6 * top_k)


def documents_digest(documents: Documents) -> str:
    """A digest of all token ids and prompt lengths, in order."""
    digest = hashlib.sha256()
    for index in range(len(documents)):
        document = documents[index]
        digest.update(document.prompt_len.to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(document.token_ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def store_features(
    base: DmtdModel,
    documents: Documents,
    directory: Path,
    key: FeatureKey,
    *,
    with_thought: bool,
    row_len: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureStore:
    """Compute what is missing and return the store.

    Args:
        base: the plain model; its device and type are used.
        documents: in the order of their ``first_row``, without gaps.
        directory: of the files; made, or continued, or made anew if its key differs.
        key: what the features belong to.
        with_thought: store thoughts too.
        row_len: tokens of a forward pass.
        autocast: context of the forward passes.
        on_progress: called with (tokens done, tokens in all).

    Raises:
        ModelError: not enough room on the disk.
    """
    last = documents[len(documents) - 1]
    tokens, hidden = last.first_row + len(last.token_ids), base.config.hidden_size
    done = _done_tokens(directory, key)
    if done is None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _require_room(directory, needed_bytes(tokens, hidden, key.top_k, with_thought))
        done = 0
    store = FeatureStore(directory, tokens, hidden, key.top_k, with_thought, "w+" if done == 0 else "r+")
    saved = done
    for first, group in _groups(documents, row_len, done):
        with torch.no_grad(), autocast():
            thought, ids, logs = _compute(base, group, key.top_k)
        store.write(first, thought, ids, logs)
        done = first + len(ids)
        if done - saved >= _SAVE_EVERY_TOKENS or done == tokens:
            store.flush()
            _save_record(directory, key, done)
            saved = done
        on_progress(done, tokens)
    return FeatureStore(directory, tokens, hidden, key.top_k, with_thought)


def _compute(base: DmtdModel, group: list[Document], top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    device = base.model.norm.weight.device
    ids = torch.from_numpy(np.concatenate([document.token_ids for document in group])).to(device)
    lengths = [len(document.token_ids) for document in group]
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    starts = tuple(np.concatenate(([0], np.cumsum(lengths))).tolist())
    layout = make_layout(base.config, starts, positions, torch.float32)
    thought = trunk(base, ids, layout)
    rows = plain_rows(base, ids, thought, layout, torch.arange(len(ids), device=device))
    target_ids, logs = likeliest_tokens(rows, head_weight(base), top_k, 256)
    return thought, target_ids, logs


def _groups(documents: Documents, row_len: int, done: int) -> Iterator[tuple[int, list[Document]]]:
    """Documents in order, about ``row_len`` tokens at a time, from the first that is not done."""
    group: list[Document] = []
    for index in range(len(documents)):
        document = documents[index]
        if document.first_row < done:
            continue
        if group and sum(len(entry.token_ids) for entry in group) + len(document.token_ids) > row_len:
            yield group[0].first_row, group
            group = []
        group.append(document)
    if group:
        yield group[0].first_row, group


def _done_tokens(directory: Path, key: FeatureKey) -> int | None:
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return int(record["tokens_done"]) if record.get("key") == asdict(key) else None


def _save_record(directory: Path, key: FeatureKey, done: int) -> None:
    part = directory / (_RECORD + ".part")
    part.write_text(json.dumps({"key": asdict(key), "tokens_done": done}), encoding="utf-8")
    part.replace(directory / _RECORD)


def _require_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > 0.95 * free:
        raise ModelError(
            f"stored features: need {needed / 1e9:.1f} GB in {directory}, {free / 1e9:.1f} GB are free; "
            "give another directory with --cache-dir, or train with --no-cache"
        )


def _open(file: Path, dtype: type[np.generic], shape: tuple[int, ...], mode: str) -> Any:
    return np.memmap(file, dtype=dtype, mode=mode, shape=shape)  # type: ignore[call-overload]
