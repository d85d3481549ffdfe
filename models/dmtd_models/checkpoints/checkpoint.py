"""Opening a checkpoint, whatever its form: a Hugging Face directory or a GGUF file. No torch, no pickle.

First station of the flow: the exporter streams tensors from here, the torch reference and the oracle are built from
here. A ``Checkpoint`` has already been checked when it is returned: every expected tensor is there with its shape, and
none that would change the output is left over.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from dmtd_errors import at_fault
from dmtd_errors.pointers import lfs_pointer
from dmtd_errors.words import reason
from dmtd_models.checkpoints.protocol import Checkpoint
from dmtd_models.errors import CheckpointError

__all__ = ["Checkpoint", "open_checkpoint"]


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, which records no split; opening one takes seconds.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); mend that") from error


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
        from dmtd_models.checkpoints.adapter import AdaptedCheckpoint

        with contextlib.ExitStack() as on_error:
            base = on_error.enter_context(open_checkpoint(path))
            with at_fault("adapter"):
                adapted = AdaptedCheckpoint(base, adapter)
            on_error.pop_all()
        return adapted
    try:
        return _open(path)
    except OSError as error:  # no right to pass a directory, a name that is too long
        raise CheckpointError(f"{error.filename or path}: cannot be read ({reason(error)}); mend that") from error


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        from dmtd_models.checkpoints.hf import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link to {path.readlink()}, which is not there; mend the link")
        raise CheckpointError(
            f"{path}: no such file or directory; give a Hugging Face directory (config.json and safetensors) "
            "or a .gguf file"
        )
    if (pointer := lfs_pointer(path)) is not None:
        raise CheckpointError(f"{path}: {pointer}")
    if is_gguf(path):
        from dmtd_models.checkpoints.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path}: a PyTorch pickle file, which can run code when read and is refused; convert it to safetensors"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: a single weights file; give its directory, which also holds config.json")
    raise CheckpointError(f"{path}: got a file that is not GGUF; give a Hugging Face directory or a .gguf file")
