"""Records of a user's data, one after another, each with the place it stands at: JSON Lines, JSON, parquet, datasets.

Flow: a path -> ``source_files`` -> ``read_rows`` -> ``examples.py``. Nothing here knows chats or tokens.
A file is read as a stream, but a .json file that holds one list, which must fit into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmtd_errors.words import kind_of, reason
from dmtd_models.data.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_FORMS = "a .jsonl, .json or .parquet file, a directory of such files, or a directory that `save_to_disk` wrote"
_MARKS = ("state.json", "dataset_dict.json")
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record and where it stands."""

    where: str
    """For messages: "chats.jsonl:17"."""
    values: dict[str, Any]


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote this directory with ``save_to_disk``."""
    return path.is_dir() and any((path / mark).is_file() for mark in _MARKS)


def source_files(path: Path) -> tuple[Path, ...]:
    """The files that a path stands for, in a fixed order.

    Of a directory: its data files at any depth; .json files only if there are no others (beside others they are notes);
    only those of the training split, if file or folder names say so.

    Raises:
        DataError: no such path, or nothing readable there.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or directory; give {_FORMS}")
    if is_saved_dataset(path):
        return tuple(sorted(file for file in path.rglob("*") if file.is_file()))
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: got a {path.suffix or 'nameless'} file, expected {_FORMS}")
        return (path,)
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.suffix in SUFFIXES
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        and file.name not in ("dataset_info.json", "dataset_infos.json")
    )
    if not found:
        raise DataError(f"{path}: no data in this directory; give {_FORMS}")
    found = [file for file in found if file.suffix != ".json"] or found
    training = [file for file in found if any(part.startswith("train") for part in file.relative_to(path).parts)]
    return tuple(training or found)


def read_rows(path: Path) -> Iterator[Row]:
    """Every record of a file or directory.

    Raises:
        DataError: nothing readable there, or a record that is not a JSON object, with its file and line.
    """
    if is_saved_dataset(path):
        yield from _saved_rows(path)
        return
    files = source_files(path)
    for file in files:
        name = file.name if path.is_file() else str(file.relative_to(path))
        rows = _parquet_rows if file.suffix == ".parquet" else _json_rows if file.suffix == ".json" else _line_rows
        try:
            yield from rows(file, name)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({reason(error)}); give a file that can") from error


def _line_rows(file: Path, name: str) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _parsed(line, f"{name}:{number}")


def _parsed(line: bytes, where: str) -> Row:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({reason(error)}); correct or remove the line") from error
    return _row(values, where)


def _row(values: object, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{where}: got {kind_of(values)}, expected a JSON object")
    return Row(where=where, values=values)


def _json_rows(file: Path, name: str) -> Iterator[Row]:
    """A list of objects; a file of JSON Lines under this suffix is read as such."""
    with file.open("rb") as stream:
        head = stream.read(4096).lstrip()
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _line_rows(file, name)
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON ({reason(error)}); correct the file") from error
    for number, value in enumerate(values, 1):
        yield _row(value, f"{name}, entry {number}")


def _parquet_rows(file: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(where=f"{name}, row {number}", values=_present(values))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a whole parquet file ({reason(error)}); copy it again") from error


def _saved_rows(path: Path) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets passes on whatever its readers raise
        raise DataError(f"{path}: not a whole saved dataset ({error}); save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        names = list(loaded)
        name = "train" if "train" in names else names[0]
        if len(names) > 1 and "train" not in names:
            raise DataError(f"{path}: got splits {', '.join(names)}, expected one named train; give one split's folder")
        loaded = loaded[name]
    for number, values in enumerate(loaded, 1):
        yield Row(where=f"{path.name}, row {number}", values=_present(values))


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Columns without the nulls by which tables say that a record lacks them."""
    return {name: value for name, value in values.items() if value is not None}
