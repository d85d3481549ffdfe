"""Opening a checkpoint, whatever its form: a Hugging Face directory or a GGUF file. No torch, no pickle.

First station of the flow: the exporter streams tensors from here, the torch reference and the oracle are built from
here. A ``Checkpoint`` has already been checked when it is returned: every expected tensor is there with its shape, and
none that would change the output is left over.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dmtd_models.config.model import DmtdSpec, ModelConfig
from dmtd_models.errors import CheckpointError

AnyArray = npt.NDArray[np.generic]

ASSET_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
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

    def assets(self) -> dict[str, bytes]:
        """Those of ``ASSET_NAMES`` that exist, by name."""

    def close(self) -> None:
        """Let go of the files. Arrays already read stay valid."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_checkpoint(path: Path, adapter: Path | None = None) -> Checkpoint:
    """Open and check a checkpoint.

    Args:
        path: a directory with config.json and safetensors, or a .gguf file.
        adapter: a directory that ``dmtd finetune`` made of this checkpoint; its difference is added to the weights.

    Raises:
        CheckpointError: nothing readable there, or tensors missing, left over or of the wrong shape.
        ConfigError: an architecture that is not supported.
    """
    if adapter is not None:
        from dmtd_models.adapters.adapter import AdaptedCheckpoint

        with contextlib.ExitStack() as on_error:
            base = on_error.enter_context(open_checkpoint(path))
            adapted = AdaptedCheckpoint(base, adapter)
            on_error.pop_all()
        return adapted
    if path.is_dir():
        from dmtd_models.checkpoints.hf import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or directory; give a Hugging Face directory (config.json and safetensors) "
            "or a .gguf file"
        )
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        from dmtd_models.checkpoints.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path}: a PyTorch pickle file, which can run code when read and is refused; convert it to safetensors"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: a single weights file; give its directory, which also holds config.json")
    raise CheckpointError(f"{path}: got a file that is not GGUF; give a Hugging Face directory or a .gguf file")
