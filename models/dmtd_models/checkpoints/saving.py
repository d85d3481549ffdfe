"""Files that appear whole or not at all: written beside their place, with ordinary permissions, then renamed. No torch.

Stands under whatever writes adapters, checkpoints and the states of a training run. The safetensors library makes files
that only their owner may read, whatever the umask says, and reports a full disk by an error of its own.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from dmtd_errors.words import reason
from dmtd_models.errors import CheckpointError


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path beside ``file`` to write to; when the block ends well, what stands there becomes ``file``.

    Raises:
        CheckpointError: it cannot be written (no space, no right); ``file`` is as it was.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        part.chmod(mode)
        part.replace(file)
    except (OSError, SafetensorError) as error:
        raise unwritable(file, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def make_directory(directory: Path) -> None:
    """Make a directory and those above it, where they are missing.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(directory, error) from error


def unwritable(path: Path, error: BaseException) -> CheckpointError:
    """The line about a place that could not be written."""
    return CheckpointError(f"{path}: cannot be written ({reason(error)}); make room there or choose another place")


def write_json(file: Path, value: Mapping[str, object]) -> None:
    """Write an object as indented JSON.

    Raises:
        CheckpointError: see ``replacing``.
    """
    with replacing(file) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
