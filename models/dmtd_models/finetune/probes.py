"""What must not be trained on, out of files of one's own: ``read_probes(("facts.jsonl", "held_out.txt"))``.

A file holds evaluation items (see ``dmtd_models.data.task_file``), chats, texts, or is one plain text. Stands between
``--decontaminate`` and ``data``, which leaves out the documents in which something of it occurs (``dmtd_models.data.overlap``
has the rules).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dmtd_errors.words import reason
from dmtd_models.data.errors import DataError
from dmtd_models.data.examples import checked_text
from dmtd_models.data.overlap import Probe, probes_of
from dmtd_models.data.rows import SUFFIXES, Row, read_rows
from dmtd_models.data.task_file import is_item, read_items


def read_probes(files: Sequence[str]) -> tuple[Probe, ...]:
    """What to look for, of every file.

    Raises:
        DataError: a file that is not there, cannot be read, or has nothing to look for.
    """
    return tuple(probe for name in files for probe in _of_file(Path(name)))


def _of_file(path: Path) -> list[Probe]:
    if not path.exists():
        raise DataError(
            f"{path}: no such file or directory; give items, chats or texts that you have", param="decontaminate"
        )
    try:
        found = _of_records(path) if path.is_dir() or path.suffix in SUFFIXES else [_of_text(path)]
    except DataError as error:
        raise DataError(str(error), param="decontaminate") from error
    if not found:
        raise DataError(
            f"{path}: got no records, expected items, chats or texts; leave the file out", param="decontaminate"
        )
    return found


def _of_records(path: Path) -> list[Probe]:
    first = next(read_rows(path), None)
    if first is None:
        return []
    if is_item(first.values):
        return list(probes_of(read_items(path)))
    return [_of_row(path, row) for row in read_rows(path)]


def _of_row(path: Path, row: Row) -> Probe:
    text, messages = row.values.get("text"), row.values.get("messages")
    if isinstance(text, str):
        return Probe(item=row.where, texts=(checked_text(text, row.where),))
    if isinstance(messages, Sequence) and messages:
        said = list(_said(messages))
        if said:
            questions = tuple(words for role, words in said if role == "user")
            return Probe(item=row.where, texts=tuple(words for _, words in said), questions=questions)
    raise DataError(
        f"{row.where}: got neither an item nor `messages` nor `text`, expected one of them; correct {path.name}"
    )


def _said(messages: Sequence[object]) -> Iterator[tuple[str, str]]:
    """Role and words of every message that has words."""
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), str):
            yield str(message.get("role")), message["content"]


def _of_text(path: Path) -> Probe:
    try:
        return Probe(item=path.name, texts=(path.read_text(encoding="utf-8"),))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as UTF-8 text ({reason(error)}); give a text or {SUFFIXES[0]} file"
        ) from error
