"""The place where a bundle is to stand: looked at before anything is written, so that nothing of the user's is lost.

Used by ``export``. Writing itself is ``atomic``'s.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
from pathlib import Path

from dmtd_export.disk import check_room, existing_parent, one_line_disk_errors, refused
from dmtd_export.errors import ExportError
from dmtd_runtime.bundle import contract

logger = logging.getLogger("dmtd.export")

DISK_SLACK_BYTES = 64 << 20  # graphs, tokenizer, manifest
ANOTHER_PLACE = ", or name another directory with -o"
NOT_LOST = frozenset({"__pycache__"})  # Polygraphy makes it beside the bundle's data loader


def check_target(output: Path) -> None:
    """Refuse a target that is neither free nor a bundle, that holds files besides the bundle, or that cannot be written.

    Raises:
        ExportError: with what is in the way.
    """
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is a file; name a directory", param="output")
    _check_parent(output)
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if not names:
        return
    own = _bundle_files(output)
    if own is None:
        raise ExportError(f"{output} exists and is not a bundle; name another directory, or remove it", param="output")
    engines = _engines(output)
    foreign = sorted(names - own - NOT_LOST - ({contract.ENGINES_DIRECTORY} if engines is not None else set()))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ExportError(
            f"{output} holds {foreign[0]}{more} besides its bundle, which a new bundle would replace whole; "
            "move that away, or name another directory",
            param="output",
        )


def _check_parent(output: Path) -> None:
    """The work directory stands beside the bundle: in its parent, which is made where it is missing."""
    place = existing_parent(output)
    fault = (
        "Not a directory" if not place.is_dir() else "" if os.access(place, os.W_OK | os.X_OK) else "Permission denied"
    )
    if fault:
        raise refused(place, fault, ANOTHER_PLACE)


def tell_of_engines(output: Path) -> None:
    """Warn of engines in the bundle that is replaced: they were built from it, fit no other, and go with it."""
    if engines := _engines(output):
        logger.warning(
            "%s: the engines of the bundle that is replaced go with it, they fit no other (%s); "
            "build new ones afterwards with: dmtd build %s",
            output / contract.ENGINES_DIRECTORY,
            ", ".join(engines),
            shlex.quote(str(output)),
        )


def check_disk(output: Path, needed_bytes: int) -> None:
    """Refuse to start what would not fit.

    Raises:
        ExportError: with the bytes free and needed.
    """
    remedy = "free some space, or choose another -o or --dtype"
    check_room(output, needed_bytes + DISK_SLACK_BYTES, what="the bundle needs", remedy=remedy)


def one_line_os_errors(output: Path) -> contextlib.AbstractContextManager[None]:
    """Turn what the file system refuses into an ExportError that says what became of it."""
    return one_line_disk_errors(output, again="export again", remedy=ANOTHER_PLACE)


def _engines(output: Path) -> list[str] | None:
    """Names of what `dmtd build` put into the bundle; None where there is nothing, or something else as well."""
    place = output / contract.ENGINES_DIRECTORY
    if place.is_symlink() or not place.is_dir():
        return None
    # What a build that was killed left behind begins with a dot and holds nothing that anybody could use.
    inside = sorted(path for path in place.iterdir() if not (path.name.startswith(".") and ".partial-" in path.name))
    if not all((path / contract.ENGINE_RECORD_FILE).is_file() for path in inside):
        return None
    return [path.name for path in inside]


def _bundle_files(directory: Path) -> set[str] | None:
    """Names of the files that the bundle's manifest lists, and its own; None if there is no bundle's manifest."""
    try:
        raw = json.loads((directory / contract.MANIFEST_FILE).read_text(encoding="utf-8"))
        return {contract.MANIFEST_FILE, *raw["files"]} if isinstance(raw["schema"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
