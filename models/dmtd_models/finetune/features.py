"""What frozen layers compute, stored once and read in every epoch: the trunk, and the plain model's likeliest tokens.

Frozen layers and the whole plain model give the same numbers for a text each time. They are computed in one pass over the data
and kept in plain memory-mapped files, addressed by a token's place among all tokens of the data set:

    trunk.bin          bfloat16 [tokens, hidden]       after the last frozen layer, if there is one
    target_ids.bin     int32 [tokens, k]
    target_logs.bin    float16 [tokens, k]             logarithms of probabilities at temperature 1
    features.json      what the numbers belong to, and how many tokens are done

They stand in a directory named by what they belong to, so that runs over other weights, text or layers keep theirs beside
them. The pass goes on where it was interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmtd_models.checkpoints.saving import make_directory, write_json
from dmtd_models.errors import ModelError
from dmtd_models.finetune.batches import Batch, Document, Documents
from dmtd_models.finetune.claim import claimed
from dmtd_models.finetune.packed import make_layout
from dmtd_models.finetune.student import head_weight, likeliest_tokens, plain_rows, plain_trunk
from dmtd_models.reference.dmtd import DmtdModel

_RECORD, _TRUNK, _IDS, _LOGS = "features.json", "trunk.bin", "target_ids.bin", "target_logs.bin"
_SAVE_EVERY_TOKENS = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureKey:
    """What stored features belong to."""

    weights: str  # digest of the plain model's weights and configuration
    documents: str  # digest of all token ids
    frozen_layers: int
    top_k: int

    @property
    def name(self) -> str:
        """Of the directory."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


class FeatureStore:
    """Stored features of one data set, read by place."""

    def __init__(self, directory: Path, tokens: int, hidden: int, key: FeatureKey, mode: str = "r") -> None:
        self._trunk = _open(directory / _TRUNK, np.int16, (tokens, hidden), mode) if key.frozen_layers else None
        self._ids = _open(directory / _IDS, np.int32, (tokens, key.top_k), mode)
        self._logs = _open(directory / _LOGS, np.float16, (tokens, key.top_k), mode)

    def add_to(self, batch: Batch) -> None:
        """Put the features of a batch's rows into it: ``trunk`` [n, hidden], ``target_ids``, ``target_log_probs`` [r, k]."""
        rows = batch["rows"].numpy()
        learnt = rows[batch["loss_rows"].numpy()]
        if self._trunk is not None:
            batch["trunk"] = torch.from_numpy(self._trunk[rows]).view(torch.bfloat16)
        batch["target_ids"] = torch.from_numpy(self._ids[learnt].astype(np.int64))
        batch["target_log_probs"] = torch.from_numpy(self._logs[learnt].astype(np.float32))

    def write(self, first: int, trunk: Tensor | None, ids: Tensor, logs: Tensor) -> None:
        """Store the rows from place ``first`` on."""
        rows = slice(first, first + len(ids))
        if self._trunk is not None and trunk is not None:
            self._trunk[rows] = trunk.to(torch.bfloat16).cpu().view(torch.int16).numpy()
        self._ids[rows] = ids.cpu().numpy()
        self._logs[rows] = logs.cpu().clamp(min=-6e4).numpy()

    def save(self, directory: Path, key: FeatureKey, done: int) -> None:
        """Let the files hold what was written, then note that the first ``done`` tokens are there."""
        for array in (self._trunk, self._ids, self._logs):
            if isinstance(array, np.memmap):
                array.flush()
        write_json(directory / _RECORD, {"key": asdict(key), "tokens_done": done})


def _file_sizes(tokens: int, hidden: int, key: FeatureKey) -> dict[str, int]:
    """Bytes of each file."""
    sizes = {_IDS: 4 * tokens * key.top_k, _LOGS: 2 * tokens * key.top_k}
    return {_TRUNK: 2 * tokens * hidden, **sizes} if key.frozen_layers else sizes


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


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
    row_len: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureStore:
    """Compute what is missing and return the store.

    Args:
        base: the plain model; its device and type are used.
        documents: in the order of their ``first_row``, without gaps.
        directory: of stores, this one in a directory of its own there; it is made, or continued.
        key: what the features belong to.
        row_len: tokens of a forward pass.
        autocast: context of the forward passes.
        on_progress: called with (tokens done, tokens in all).

    Raises:
        ModelError: not enough room on the disk, or another process computes the same.
    """
    last = documents[len(documents) - 1]
    tokens, hidden = last.first_row + len(last.token_ids), base.config.hidden_size
    directory = directory / key.name
    sizes = _file_sizes(tokens, hidden, key)
    if _done_tokens(directory, key, sizes) != tokens:
        make_directory(directory)
        remedy = "wait until it has ended, or give another --cache-dir"
        with claimed(directory, "stored features", remedy):
            _compute_missing(base, documents, directory, key, sizes, row_len, autocast, on_progress)
    return FeatureStore(directory, tokens, hidden, key)


def _compute_missing(
    base: DmtdModel,
    documents: Documents,
    directory: Path,
    key: FeatureKey,
    sizes: Mapping[str, int],
    row_len: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    on_progress: Callable[[int, int], None],
) -> None:
    last = documents[len(documents) - 1]
    tokens, hidden = last.first_row + len(last.token_ids), base.config.hidden_size
    done = _done_tokens(directory, key, sizes)
    if done is None:
        _make_files(directory, sizes)
        done = 0
    store = FeatureStore(directory, tokens, hidden, key, "r+")
    saved = done
    try:
        for first, group in _groups(documents, row_len, done):
            token_ids = torch.from_numpy(np.concatenate([document.token_ids for document in group]))
            lengths = [len(document.token_ids) for document in group]
            rows = torch.arange(len(token_ids))
            with torch.no_grad(), autocast():
                trunk, ids, logs = _compute(base, key.frozen_layers, token_ids, lengths, rows, key.top_k)
            store.write(first, trunk, ids, logs)
            done = first + len(ids)
            if done - saved >= _SAVE_EVERY_TOKENS:
                store.save(directory, key, done)
                saved = done
            on_progress(done, tokens)
    finally:
        if done > saved:  # at the end, or when an error or Ctrl-C ends the pass
            store.save(directory, key, done)


def add_computed(
    base: DmtdModel,
    batch: Batch,
    *,
    frozen_layers: int,
    top_k: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Put into a batch that is used many times what ``FeatureStore.add_to`` would have read for it."""
    lengths = torch.diff(batch["starts"]).tolist()
    with torch.no_grad(), autocast():
        trunk, ids, logs = _compute(base, frozen_layers, batch["input_ids"], lengths, batch["loss_rows"], top_k)
    if frozen_layers:
        batch["trunk"] = trunk.to(torch.bfloat16).cpu()
    batch["target_ids"], batch["target_log_probs"] = ids.cpu(), logs.float().cpu()


def _compute(
    base: DmtdModel, frozen_layers: int, token_ids: Tensor, lengths: Sequence[int], rows: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The trunk of all packed tokens; the plain model's likeliest tokens, with their logarithms, at ``rows``."""
    device = base.model.norm.weight.device
    ids = token_ids.to(device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    starts = tuple(np.concatenate(([0], np.cumsum(lengths))).tolist())
    layout = make_layout(base.config, starts, positions, torch.float32)
    trunk = plain_trunk(base, ids, frozen_layers, layout)
    plain = plain_rows(base, trunk, frozen_layers, layout, rows.to(device))
    target_ids, logs = likeliest_tokens(plain, head_weight(base), top_k, 256)
    return trunk, target_ids, logs


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


def _done_tokens(directory: Path, key: FeatureKey, sizes: Mapping[str, int]) -> int | None:
    """How many tokens of a store are there; None: nothing to go on with."""
    if any(_size(directory / name) != size for name, size in sizes.items()):
        return None
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("key") != asdict(key):
        return None
    done = record.get("tokens_done")
    return done if isinstance(done, int) else None


def _make_files(directory: Path, sizes: Mapping[str, int]) -> None:
    """Empty files whose room is taken at once: a mapped page without room would end the process when it is written."""
    make_directory(directory)
    for name in (_RECORD, _TRUNK, _IDS, _LOGS):
        (directory / name).unlink(missing_ok=True)
    needed, free = sum(sizes.values()), shutil.disk_usage(directory).free
    try:
        if needed > 0.95 * free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, size in sizes.items():
            with (directory / name).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        for name in sizes:
            (directory / name).unlink(missing_ok=True)
        raise ModelError(
            f"stored features: need {needed / 1e9:.1f} GB in {directory}, {free / 1e9:.1f} GB are free ({error.strerror}); "
            "give another directory with --cache-dir, or train with --no-cache"
        ) from error


def _open(file: Path, dtype: type[np.generic], shape: tuple[int, ...], mode: str) -> Any:
    return np.memmap(file, dtype=dtype, mode=mode, shape=shape)  # type: ignore[call-overload]
