"""The tokenizer and configuration files that a bundle carries over from its checkpoint, byte for byte, and opened once.

A bundle whose tokenizer or sampling defaults cannot be read would only fail when it is first used; the export is the place
to say so. Called by ``export``.
"""

from __future__ import annotations

import logging
from pathlib import Path

from dmtd_export.errors import ExportError
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_runtime.bundle.opening import read_generation_config
from dmtd_runtime.errors import DmtdError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.text.chat_template import ChatTemplate
from dmtd_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger("dmtd.export")


def write_assets(directory: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint's files into ``directory``, and try them as the runtime will.

    Raises:
        ExportError: one of them is damaged.
    """
    assets = checkpoint.assets()
    for name, content in assets.items():
        (directory / name).write_bytes(content)
    try:
        tokenizer = Tokenizer.from_directory(directory)
        SamplingParams.from_generation_config(read_generation_config(directory))
        if tokenizer is not None:
            ChatTemplate.from_directory(directory)
    except DmtdError as error:
        found = str(error).replace(str(directory), str(checkpoint.path)).rpartition("; ")[0] or str(error)
        raise ExportError(
            f"{found}; restore that file in the checkpoint, or take it out to export without it"
        ) from error
    if tokenizer is None:
        logger.warning("%s: the bundle works on token ids only", checkpoint.tokenizer_problem)
        return
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        logger.warning(
            "%s: tokenizer.json has %d tokens, the model %d: prompts with the others are refused",
            checkpoint.path,
            tokenizer.vocab_size,
            checkpoint.config.vocab_size,
        )
