"""The place of the engines: looked at before a build, and what the file system refuses told in one line."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from importlib.resources import files as resource_files
from pathlib import Path

from dmtd_export.errors import ExportError
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import FileInfo, Manifest

DISK_SLACK_BYTES = 16 << 20


def check_disk(directory: Path, needed_bytes: int) -> None:
    """Refuse to start what would not fit.

    Raises:
        ExportError: with the bytes free and needed.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, needed_bytes + DISK_SLACK_BYTES
    if free < needed:
        raise ExportError(
            f"{place} has {free / 1e9:.2f} GB free, the engines need up to {needed / 1e9:.2f} GB; free some space there"
        )


@contextlib.contextmanager
def one_line_disk_errors(directory: Path) -> Iterator[None]:
    """Turn what the file system refuses into an ExportError that says what became of the engines."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"no space left while writing {directory}: free some and build again; nothing was kept"
            ) from error
        if error.errno is None or error.errno == errno.ENOMEM:  # the latter is no fault of the place
            raise
        raise ExportError(
            f"{error.filename or directory}: {error.strerror}; mend that and build again; nothing was kept"
        ) from error


def copy_companions(bundle: Path, directory: Path, manifest: Manifest) -> dict[str, FileInfo]:
    """What engines of the simulator need beside them: the weights file, and valid inputs for trying them by hand.

    Copies, no links: onnx's checker takes a linked weights file for an attack, the bundle's own as well.
    """
    shutil.copyfile(bundle / contract.WEIGHTS_FILE, directory / contract.WEIGHTS_FILE)
    loader = resource_files("dmtd_export").joinpath("bundle", "polygraphy_data.py").read_text(encoding="utf-8")
    (directory / contract.DATA_LOADER_FILE).write_text(loader, encoding="utf-8")
    return {contract.WEIGHTS_FILE: manifest.files[contract.WEIGHTS_FILE]}
