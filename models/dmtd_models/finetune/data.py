"""The text of a run: sources read and joined, a held-out share set apart, what must not be learnt taken out.

Stands between ``dmtd_models.data``, which reads single sources, and ``run``. Nothing here tokenises or packs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.overlap import OverlapIndex, Probe, drop_leaks
from dmtd_models.data.read_data import ReadOptions, read_training_data
from dmtd_models.errors import ModelError

_MAX_HELD_OUT = 128
_HELD_OUT_SHARE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class RunText:
    """What a run learns from, and how it came about."""

    train: Any  # datasets.Dataset with input_ids and prompt_len
    held_out: Any  # the same
    notes: tuple[str, ...]  # one line for each source, and for what was taken out


def read_run_text(
    sources: Sequence[str],
    held_out: Sequence[str],
    tokenizer: TextTokenizer,
    options: ReadOptions,
    cache_dir: Path,
    *,
    probes: Sequence[Probe] = (),
    seed: int = 0,
) -> RunText:
    """Read training and held-out text.

    Args:
        sources: files or directories.
        held_out: the same, for evaluation during training; without any, a seeded 2% of the documents (at most 128), all
            pieces of each: what is held out shares no document with what is trained on.
        tokenizer: the model's.
        options: lengths, and the form of examples.
        cache_dir: of tokenised text.
        probes: what must not be trained on; documents in which something of it occurs are left out.
        seed: of the held-out choice.

    Raises:
        DataError: a source that cannot be used.
        ModelError: nothing is left to train on.
    """
    from datasets import concatenate_datasets

    notes = []
    parts: list[Any] = []
    for number, source in enumerate(sources):
        data = read_training_data(source, tokenizer, options, cache_dir)
        parts.append(data.dataset.add_column("source", np.full(len(data.dataset), number)))
        notes.append(f"{source}: {data.counts.summary()}")
    if not parts:
        raise ModelError("training text: got no source; give --data FILE or DIRECTORY, or --answer-tokens")
    whole = concatenate_datasets(parts)
    if probes:
        before = len(whole)
        whole, _ = drop_leaks(whole, OverlapIndex(probes), tokenizer)
        notes.append(
            f"documents left out because something of --decontaminate occurs in them: {before - len(whole)} of {before}"
        )
    if held_out:
        kept = [read_training_data(source, tokenizer, options, cache_dir).dataset for source in held_out]
        notes += [
            f"{source}: held out, but trained on too; numbers on it tell nothing"
            for source in held_out
            if source in sources
        ]
        evaluation = concatenate_datasets(kept)
        evaluation = evaluation.select(range(min(_MAX_HELD_OUT, len(evaluation))))
        train = whole
    else:
        train, evaluation = _set_apart(whole, seed)
    if not len(train):
        raise ModelError("training text: nothing is left to train on; give more --data")
    return RunText(train=train, held_out=evaluation, notes=tuple(notes))


def _set_apart(whole: Any, seed: int) -> tuple[Any, Any]:
    """What is trained on, and a seeded share of whole documents that is held out."""
    document = _documents(whole)
    num_documents = int(document.max(initial=-1)) + 1
    count = min(_MAX_HELD_OUT, int(num_documents * _HELD_OUT_SHARE))
    chosen = np.isin(document, np.random.default_rng(seed).permutation(num_documents)[:count])
    return whole.select(np.flatnonzero(~chosen)), whole.select(np.flatnonzero(chosen)[:_MAX_HELD_OUT])


def _documents(dataset: Any) -> npt.NDArray[np.int64]:
    """Which document each example is of, int64 [examples], counted from 0 in order of first appearance."""
    table = dataset.select_columns(["source", "document"]).with_format("arrow")[:]
    pairs = np.stack([table[name].to_numpy() for name in ("source", "document")])
    return np.concatenate(([0], np.cumsum((np.diff(pairs) != 0).any(axis=0)))) if pairs.size else pairs[0]


def text_digest(dataset: Any) -> str:
    """A digest of all token ids and where their documents and prompts end, in order: files of one name may change."""
    import pyarrow.compute

    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        ids = table["input_ids"]
        for column in (pyarrow.compute.list_value_length(ids), table["prompt_len"], pyarrow.compute.list_flatten(ids)):
            digest.update(column.to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()
