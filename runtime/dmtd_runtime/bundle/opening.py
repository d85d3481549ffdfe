"""Opening a bundle: manifest, sizes, and hashes the first time a bundle is seen on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dmtd_errors.words import reason
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest, load_manifest
from dmtd_runtime.errors import BundleError


def open_bundle(directory: Path) -> Manifest:
    """Load the manifest and check every file against it: sizes always, hashes once.

    Hashes that were right are remembered under the user's cache directory by path, size and modification time.
    """
    manifest = load_manifest(directory)
    manifest.check_files(directory, hashes=False)
    names = (contract.MANIFEST_FILE, *manifest.files)
    checked_once(directory, names, lambda: manifest.check_files(directory, hashes=True))
    return manifest


def checked_once(directory: Path, names: Sequence[str], check: Callable[[], None]) -> None:
    """Call ``check``, which reads whole files, unless it passed before on files that look the same from outside."""
    state = _state(directory, names)
    if _is_remembered(state):
        return
    check()
    # A cache that cannot be written costs a check the next time, no more.
    with contextlib.suppress(OSError, RuntimeError):
        mark = cache_directory() / "checked" / state
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json of a bundle, {} if it has none."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} cannot be read as JSON ({reason(error)}); export the bundle again") from None
    return raw if isinstance(raw, dict) else {}


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/dmtd, by default ~/.cache/dmtd. RuntimeError for a user without a home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmtd"


def _is_remembered(state: str) -> bool:
    try:
        return (cache_directory() / "checked" / state).is_file()
    except (OSError, RuntimeError):  # no home directory, or one that may not be read
        return False


def _state(directory: Path, names: Sequence[str]) -> str:
    """A name for what files look like from outside."""
    state: list[Any] = [str(directory.resolve())]
    for name in sorted(names):
        stat = (directory / name).stat()
        state.append([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
