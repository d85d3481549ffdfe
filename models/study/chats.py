"""Chats of a base model with itself, from its checkpoint: ``write_chats`` puts model, tokenizer and usual prompts together.

Entry of ``answers`` (the writer) for ``job`` and for scripts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.config.model import SplitOptions, resolve_dmtd
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.finetune.options import usual_precision
from dmtd_models.reference.dmtd import DmtdModel
from study.answers import AnswerOptions, ShardProgress, write_answers
from study.questions import Mix, mixed_prompts


def write_chats(
    checkpoint: Checkpoint,
    tokenizer: TextTokenizer,
    directory: Path,
    options: AnswerOptions,
    *,
    device: str | None = None,
    progress: Callable[[ShardProgress], None] | None = None,
) -> None:
    """Let the plain model write chats into ``directory``; those that are there already count.

    Args:
        checkpoint: the base.
        tokenizer: of the base, with its chat template.
        directory: of the shards, see ``write_answers``.
        options: how many answer tokens, how drawn, from which seed.
        device: cpu or cuda; by default cuda where there is one.
        progress: called after each shard.

    Raises:
        AnswersError: see ``write_answers``.
        DataError: the checkpoint has no chat template.
    """
    plain = resolve_dmtd(checkpoint.config, None, SplitOptions(decoding_layers=1, cycle_length=1))
    model = DmtdModel.from_reader(checkpoint.config, plain, checkpoint.read, getattr(torch, usual_precision(device)))
    write_answers(
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        Tokenizer.from_str(checkpoint.assets()["tokenizer.json"].decode()),
        lambda question: tokenizer.render([{"role": "user", "content": question}], add_generation_prompt=True),
        mixed_prompts(seed=options.seed, mix=Mix()),
        directory,
        options,
        progress=progress,
    )
