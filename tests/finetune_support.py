"""What the tests of fine-tuning share: documents, data sets and a model over a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dmtd_models.config.model import DmtdSpec, SplitOptions, resolve_dmtd
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
        yield checkpoint, resolve_dmtd(checkpoint.config, checkpoint.dmtd, SplitOptions(**split))


def reading(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint as float32."""
    return {name: np.asarray(checkpoint.read(name), dtype=np.float32) for name in names}


RUN_LENGTHS = [(8 + 5 * n % 23, 2 + n % 5) for n in range(24)]


def run_options(**given: Any) -> Any:
    """Short rows, every step logged and saved, columns sampled: vocabulary 600 (see ``write_base``)."""
    from dmtd_models.finetune.options import LossOptions, TrainOptions

    chosen = {
        "precision": "float32",
        "tokens_per_step": 64,
        "epochs": 2.0,
        "learning_rate": 3e-3,
        "save_every_s": 0.0,
        "log_every_steps": 1,
        "eval_every_tokens": 0,
        "loss": LossOptions(top_k=2, vocab_sample=100),
    }
    return TrainOptions(**{**chosen, **given})


def write_base(directory: Path, **given: Any) -> Path:
    """The plain model of these runs: Qwen3, four layers."""
    from dmtd_models.reference.testing import write_tiny_checkpoint

    return write_tiny_checkpoint(directory, **{"layers": 4, "vocab_size": 600, "seed": 1, **given})


def run_tiny(base: Path, output: Path, options: Any, *, hooks: Any = None, convention: int = 1, cycle: int = 3) -> Any:
    """One run over two dozen random documents and a few held-out ones."""
    from dmtd_models.finetune.run import finetune

    documents = documents_of(RUN_LENGTHS, seed=2, vocab=600)
    held_out = documents_of([(20, 6), (15, 4)], seed=3, vocab=600)
    origin, prompt_input = CONVENTIONS[convention]
    split = {"decoding_layers": 2, "cycle_length": cycle, "cycle_origin": origin, "prompt_input": prompt_input}
    with opened(base, **split) as (checkpoint, spec):
        return finetune(
            checkpoint,
            spec,
            dataset_of(documents),
            dataset_of(held_out),
            output,
            options,
            device="cpu",
            **(hooks or {}),
        )


def interrupted_at(step: int, act: Any) -> Any:
    """What makes a run call ``act`` when ``step`` is logged: after it was taken, before it is saved."""

    def on_log(values: Any) -> None:
        if values["step"] == step and "divergence" in values:
            act()

    return {"on_log": on_log}
