"""The tokenizer and configuration files that a bundle carries over from its checkpoint, byte for byte, and opened once.

A bundle whose tokenizer or sampling defaults cannot be read would only fail when it is first used; the export is the place
to say so. Called by ``export``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from dmtd_errors.words import reason
from dmtd_export.errors import ExportError
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_runtime.bundle.opening import read_generation_config
from dmtd_runtime.errors import DmtdError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.text.chat_template import ChatTemplate
from dmtd_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger("dmtd.export")


_GENERATION_CONFIG = "generation_config.json"


def write_assets(directory: Path, checkpoint: Checkpoint, generation_config: str | None = None) -> None:
    """Write the checkpoint's files into ``directory``, and try them as the runtime will.

    ``generation_config``: see ``ExportOptions``.

    Raises:
        ExportError: one of them is damaged.
    """
    assets = checkpoint.assets()
    if generation_config is not None:
        assets[_GENERATION_CONFIG] = _other_generation_config(assets, generation_config)
    for name, content in assets.items():
        (directory / name).write_bytes(content)
    try:
        tokenizer = Tokenizer.from_directory(directory)
        SamplingParams.from_generation_config(read_generation_config(directory), ignored=logger.warning)
        if tokenizer is not None:
            ChatTemplate.from_directory(directory)
    except DmtdError as error:
        found = str(error).replace(str(directory), str(checkpoint.path)).rpartition("; ")[0] or str(error)
        way = "restore that file in the checkpoint, or take it out to export without it"
        if _GENERATION_CONFIG in found:
            way = "restore that file in the checkpoint, or leave it out with --generation-config none"
        raise ExportError(f"{found}; {way}") from error
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


def _other_generation_config(assets: Mapping[str, bytes], wanted: str) -> bytes:
    """What takes the place of generation_config.json: a file's content, or with ``none`` the token ids, which are no option."""
    if wanted != "none":
        try:
            return Path(wanted).read_bytes()
        except OSError as error:
            raise ExportError(
                f"{wanted} cannot be read ({reason(error)}); name a JSON file, or none", param="generation_config"
            ) from error
    try:
        raw = json.loads(assets.get(_GENERATION_CONFIG, b"{}"))
    except ValueError:
        raw = None
    kept = {name: value for name, value in raw.items() if name.endswith("_token_id")} if isinstance(raw, dict) else {}
    return (json.dumps(kept, indent=2) + "\n").encode()
