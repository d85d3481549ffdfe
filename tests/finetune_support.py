"""What the tests of fine-tuning share: documents, data sets and a model over a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_models.checkpoint import Checkpoint, open_checkpoint
from dmtd_models.config import DmtdSpec, resolve_dmtd
from dmtd_models.finetune.batches import Document

CONVENTIONS = (("absolute", "cyclical"), ("prompt", "thinking"), ("prompt", "sum"))


def spec_of(
    convention: tuple[str, str] = ("prompt", "thinking"),
    *,
    encoding: int = 0,
    thinking: int = 2,
    decoding: int = 2,
    cycle: int = 3,
) -> DmtdSpec:
    """A split and convention by hand."""
    return DmtdSpec(
        encoding_layers=encoding,
        thinking_layers=thinking,
        decoding_layers=decoding,
        cycle_length=cycle,
        cycle_origin=convention[0],
        prompt_input=convention[1],
        trained=False,
        convention_recorded=True,
    )


def documents_of(lengths: Sequence[tuple[int, int]], *, seed: int = 0, vocab: int = 128) -> list[Document]:
    """Random documents of (length, prompt length), one behind another in their data set."""
    rng = np.random.default_rng(seed)
    made, first = [], 0
    for length, prompt in lengths:
        made.append(Document(token_ids=rng.integers(vocab, size=length), prompt_len=prompt, first_row=first))
        first += length
    return made


def dataset_of(documents: Sequence[Document]) -> Any:
    """The same as a ``datasets.Dataset``."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [document.token_ids.astype(np.int32) for document in documents],
            "prompt_len": [document.prompt_len for document in documents],
        }
    )


@contextmanager
def opened(path: Path, **split: Any) -> Any:
    """(checkpoint, spec) of a directory; one with DMTD fields needs no split."""
    with open_checkpoint(path) as checkpoint:
        yield checkpoint, resolve_dmtd(checkpoint.config, checkpoint.dmtd, **split)


def reading(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint as float32."""
    return {name: np.asarray(checkpoint.read(name), dtype=np.float32) for name in names}
