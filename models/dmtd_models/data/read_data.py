"""A user's data as a tokenised data set: ``read_training_data``. Needs datasets.

Flow: path -> ``rows`` -> ``examples`` -> one Arrow file in the cache -> ``datasets.Dataset``
with columns ``input_ids`` (list of int32), ``prompt_len`` and ``document`` (int64, the number of its record: a long text and a
chat of several answers give several examples), memory-mapped, in the order of the source.
Nothing here shuffles, packs or holds out; all checks of single records are in ``examples.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dmtd_errors.words import counted, reason
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.errors import DataError
from dmtd_models.data.examples import Example, Examples
from dmtd_models.data.rows import read_rows, source_files

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 2
"""Of cached files; raise it when the same source would give other examples."""
_BATCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How records become examples."""

    max_length: int = 1024
    """Tokens of an example, at most."""
    cycle_origin: Literal["absolute", "prompt"] = "prompt"
    """``prompt``: a chat gives one example for each answer. ``absolute``: one example, its prompt ends at the first."""

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise DataError(f"max_length: got {self.max_length}, expected at least 8 tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCounts:
    """What was read and what became of it."""

    form: str
    """``messages``, ``text`` or ``ids``."""
    records: int
    examples: int
    tokens: int
    answer_tokens: int
    """Tokens after the prompts; of documents, all."""
    cut_texts: int
    """Documents longer than an example, given in pieces."""
    cut_answers: int
    """Answers that lost their end."""
    dropped_prompts: int
    """Examples left out because the prompt alone fills them."""
    dropped_short: int
    """Pieces of fewer than two tokens."""

    def summary(self) -> str:
        """One line for a log."""
        read = (
            f"{counted(self.records, 'record')}, {counted(self.examples, 'example')}, {counted(self.tokens, 'token')}"
        )
        line = f"{read} ({self.answer_tokens} answer)"
        notes = (
            (self.cut_texts, f"{counted(self.cut_texts, 'document')} cut into pieces"),
            (self.cut_answers, f"{counted(self.cut_answers, 'answer')} cut"),
            (self.dropped_prompts, f"{self.dropped_prompts} dropped: prompt too long"),
            (self.dropped_short, f"{self.dropped_short} dropped: under two tokens"),
        )
        return "; ".join([line, *(words for count, words in notes if count)])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Tokenised examples and their counts."""

    dataset: Dataset
    counts: ReadCounts
    path: Path
    """The Arrow file, kept for the next run over the same source."""


def read_training_data(source: str, tokenizer: TextTokenizer, options: ReadOptions, cache_dir: Path) -> TrainingData:
    """Read, check and tokenise a source, or find it done in the cache.

    Args:
        source: a path; see ``rows.py`` for what is read.
        tokenizer: the model's.
        options: lengths and form of examples.
        cache_dir: tokenised files are kept here.

    Raises:
        DataError: nothing to train on, or a record with something wrong, by file and line.
    """
    target = cache_dir / "tokenized" / f"{_fingerprint(source, tokenizer, options)}.arrow"
    note = target.with_suffix(".json")
    if not (target.is_file() and note.is_file()):
        _write(source, tokenizer, options, target)
    from datasets import Dataset

    counts = ReadCounts(**json.loads(note.read_text(encoding="utf-8")))
    return TrainingData(dataset=Dataset.from_file(str(target)), counts=counts, path=target)


def _fingerprint(source: str, tokenizer: TextTokenizer, options: ReadOptions) -> str:
    files = source_files(Path(source))
    origin = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = json.dumps([_FORMAT, origin, tokenizer.fingerprint, asdict(options)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


_Numbered = tuple[int, Example]


def _examples(source: str, maker: Examples) -> Iterator[_Numbered]:
    """Examples, each with the number of its record."""
    for number, row in enumerate(read_rows(Path(source))):
        for example in maker.of_row(row):
            yield number, example


def _write(source: str, tokenizer: TextTokenizer, options: ReadOptions, target: Path) -> None:
    """Write the Arrow file and, last, its counts; both appear whole or not at all."""
    maker = Examples(tokenizer=tokenizer, max_length=options.max_length, whole_chats=options.cycle_origin == "absolute")
    # Every process of a distributed run may come here at once: each writes its own file, and the last one stays.
    part = target.with_name(f".{target.stem}-{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_arrow(part, _examples(source, maker))
        tally = maker.tally
        if maker.form is None:
            raise DataError(f"{source}: no data: got 0 records, expected chats or documents; check the file")
        if tally.examples == 0:
            raise DataError(
                f"{source}: no data: none of {counted(tally.records, 'record')} gives an example of at most {options.max_length} "
                f"tokens ({counted(tally.dropped_prompts, 'prompt')} too long, {tally.dropped_short} under two tokens); "
                "raise --max-length (and --tokens-per-step, which bounds it) or give other data"
            )
        counts = ReadCounts(form=maker.form, **asdict(tally))
        note = part.with_suffix(".note")
        note.write_text(json.dumps(asdict(counts)), encoding="utf-8")
        part.replace(target)
        note.replace(target.with_suffix(".json"))
    except OSError as error:
        raise DataError(
            f"{target.parent}: cannot be written ({reason(error)}); make room there, or set XDG_CACHE_HOME to another directory"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _write_arrow(path: Path, examples: Iterator[_Numbered]) -> None:
    import pyarrow

    ids, length = pyarrow.list_(pyarrow.int32()), pyarrow.int64()
    schema = pyarrow.schema([("input_ids", ids), ("prompt_len", length), ("document", length)])
    with path.open("wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(examples, _BATCH)):
            columns = [
                pyarrow.array([example.input_ids for _, example in batch], ids),
                pyarrow.array([example.prompt_len for _, example in batch], length),
                pyarrow.array([number for number, _ in batch], length),
            ]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
