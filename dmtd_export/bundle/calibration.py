"""Calibration text: what an export looks at where rounding depends on what a model computes.

--calibration FILE --> CalibrationText: sequences of token ids, each with the length of its prompt

A file is read as `dmtd evaluate --text` reads it: plain text, or .jsonl, .json or .parquet records with ``text``, ``messages`` or
``prompt_ids`` and ``answer_ids``. Nothing here runs a model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmtd_errors.words import counted, reason
from dmtd_export.errors import ExportError
from dmtd_export.options import CALIBRATION_TOKENS
from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.examples import Example, Examples
from dmtd_models.data.rows import SUFFIXES, read_rows
from dmtd_models.errors import ModelError

logger = logging.getLogger("dmtd.export")

WINDOW_LEN = 512  # tokens of a sequence, at most
MIN_LEN = 16  # tokens of a sequence
PROMPT_SHARE = 4  # of a document one token in so many is its prompt
CANDIDATES = 8  # tokens that are read for each one that is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSequence:
    """A text's or chat's tokens; the first ``prompt_len``, at least one, count as the prompt, behind which cycles begin."""

    token_ids: tuple[int, ...]
    prompt_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """What was taken of some files."""

    sequences: tuple[CalibrationSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, prompts among them."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the token ids and the lengths of prompts, whichever files they came from."""
        digest = hashlib.sha256()
        for each in self.sequences:
            digest.update(np.array([len(each.token_ids), each.prompt_len, *each.token_ids], "<i8").tobytes())
        return digest.hexdigest()


def read_calibration(
    names: Sequence[str],
    tokenizer: TextTokenizer,
    *,
    max_tokens: int,
    window_len: int = WINDOW_LEN,
) -> CalibrationText:
    """Sequences of at most ``window_len`` tokens out of some files, ``max_tokens`` in all, shared evenly by the files.

    They are spread over a file's beginning, so that one document does not stand for all; the same files give the same ones.

    Raises:
        ExportError: a file that is not there or holds nothing that can be used, or too little text in all of them.
    """
    assert names, "files were given"
    found: list[CalibrationSequence] = []
    for name in names:
        share = max(1, max_tokens // len(names))
        try:
            candidates = list(_within(_sequences(Path(name), tokenizer, window_len), CANDIDATES * share))
        except ModelError as error:
            raise ExportError(str(error), param="calibration") from None
        except ImportError as error:
            raise ExportError(
                f"{name}: chats are rendered by transformers, which cannot be imported ({reason(error)}); run: "
                'pip install "dmtd[train]", or give plain text',
                param="calibration",
            ) from None
        if not candidates:
            raise ExportError(
                f"{name}: no text of {MIN_LEN} tokens in it; give a text file, or records as dmtd evaluate --text takes them",
                param="calibration",
            )
        if (held := sum(len(each.token_ids) for each in candidates)) < share:
            logger.warning(
                "%s: holds %d tokens, fewer than the %d that --calibration-tokens asks of it; all of them are read",
                name,
                held,
                share,
            )
        found += _spread(candidates, share)
    text = CalibrationText(sequences=tuple(found))
    if text.num_tokens < (least := CALIBRATION_TOKENS.start):
        raise ExportError(
            f"got {counted(text.num_tokens, 'token')}, expected {least} or more; give a longer text, or several",
            param="calibration",
        )
    return text


def _sequences(path: Path, tokenizer: TextTokenizer, window_len: int) -> Iterator[CalibrationSequence]:
    examples = Examples(tokenizer=tokenizer, max_length=window_len, whole_chats=True)
    for example in _examples(path, examples):
        if (count := len(example.input_ids)) >= MIN_LEN:
            ids = tuple(int(token) for token in example.input_ids)
            yield CalibrationSequence(token_ids=ids, prompt_len=example.prompt_len or count // PROMPT_SHARE)


def _examples(path: Path, examples: Examples) -> Iterator[Example]:
    if path.is_dir() or path.suffix in SUFFIXES:
        for row in read_rows(path):
            yield from examples.of_row(row)
    else:
        yield from examples.of_document(path.name, _plain_text(path))


def _plain_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"{path}: cannot be read as text ({reason(error)}); give a text file, or {', '.join(SUFFIXES)} data",
            param="calibration",
        ) from None
    fault = "NUL bytes" if "\0" in text else "" if text.strip() else "an empty file"
    if fault:
        raise ExportError(f"{path}: got {fault}, expected text; give another", param="calibration")
    return text


def _within(sequences: Iterator[CalibrationSequence], max_tokens: int) -> Iterator[CalibrationSequence]:
    """The first sequences that together have ``max_tokens`` tokens or a few more."""
    tokens = 0
    for sequence in sequences:
        yield sequence
        tokens += len(sequence.token_ids)
        if tokens >= max_tokens:
            return


def _spread(candidates: Sequence[CalibrationSequence], max_tokens: int) -> list[CalibrationSequence]:
    """Some of the candidates, evenly spaced, that together have about ``max_tokens`` tokens; the last one is cut to fit."""
    total = sum(len(each.token_ids) for each in candidates)
    count = min(len(candidates), max(1, -(-max_tokens * len(candidates) // total)))
    taken, left = list[CalibrationSequence](), max_tokens
    for index in range(count):
        each = candidates[index * len(candidates) // count]
        ids = each.token_ids[:left]
        if len(ids) < MIN_LEN:
            break
        taken.append(CalibrationSequence(token_ids=ids, prompt_len=min(each.prompt_len, len(ids))))
        left -= len(ids)
    return taken
