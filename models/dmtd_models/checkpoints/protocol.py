"""What every opened checkpoint offers: ``Checkpoint``, the same for directories, GGUF files and adapters over either.

``checkpoint.open_checkpoint`` makes one, ``hf``, ``gguf`` and ``adapter`` implement it. Nothing here opens a file.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dmtd_models.checkpoints.blocks import BlockWeight
from dmtd_models.config.model import DmtdSpec, ModelConfig

AnyArray = npt.NDArray[np.generic]

CHAT_TEMPLATE, TOOL_USE_TEMPLATE = "chat_template.jinja", "chat_template_tool_use.jinja"
ASSET_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    TOOL_USE_TEMPLATE,
    "generation_config.json",
    "config.json",
)


class Checkpoint(Protocol):
    """A checked checkpoint. Tensors carry Hugging Face's names, in Hugging Face's layout (linear weights [out, in])."""

    @property
    def path(self) -> Path:
        """The directory or file it was opened from."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    @property
    def dmtd(self) -> DmtdSpec | None:
        """The split that the checkpoint records; None for a plain model."""

    @property
    def tokenizer_problem(self) -> str | None:
        """Why ``assets`` has no tokenizer.json, in one line; None if it has one."""

    def names(self) -> list[str]:
        """Names of the tensors in the order of computation; ``lm_head.weight`` only if it is not tied."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def read(self, name: str) -> AnyArray:
        """One tensor in a float type: mapped read-only from the file where it is stored so, else a fresh array.

        Nothing is kept: reading tensor by tensor holds one tensor in memory.
        """

    def block_source(self, name: str) -> str | None:
        """The format of the blocks that a matrix is stored in ("Q4_K", "gptq"); None for a float tensor."""

    def blocks(self, name: str) -> BlockWeight | None:
        """One matrix in those blocks, whose values are ``read``'s; None where ``block_source`` is."""

    def was_in_blocks(self, name: str) -> bool:
        """Whether a matrix was stored in blocks, be it that an adapter has changed it since."""

    def assets(self) -> dict[str, bytes]:
        """Those of ``ASSET_NAMES`` that exist, by name."""

    def close(self) -> None:
        """Let go of the files. Arrays already read stay valid."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
