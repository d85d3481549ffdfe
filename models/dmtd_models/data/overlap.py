"""Which evaluation items occur in training text: n-grams of words, and whole questions. No torch.

Flow: evaluation items -> ``probes_of`` -> ``OverlapIndex``; training documents -> ``TrainingText`` -> ``OverlapIndex.scan``
-> ``OverlapReport``. Two rules, over words without case, accents' forms and punctuation:

1. n-gram: a run of 13 words of an item occurs in a training document (nobody writes the same 13 words by chance).
2. question: a whole question of an item, of any length, is a whole question of a training chat. For items that are
   shorter than an n-gram ("What is the capital of France?").

The index holds the evaluation items alone and training text streams past it, so memory does not grow with the training
text. Matches are exact: words are compared, not hashes. ``drop_leaks`` takes the documents out that have one.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import numpy.typing as npt

from dmtd_models.data.chat import TextTokenizer
from dmtd_models.data.errors import DataError
from dmtd_models.data.items import GenerationItem, MultipleChoiceItem, TextItem

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_NGRAM: Final = 13
_WORD: Final = re.compile(r"[^\W_]+")
_UNKNOWN: Final = -1
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_Owners = int | tuple[int, ...]
"""Numbers of the items that have an n-gram; nearly always one, and a tuple for each would double the index."""
_Key = TypeVar("_Key", bytes, tuple[str, ...])
_ROLE_WORDS: Final = frozenset({"user", "system", "assistant", "human", "model"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What of an evaluation item must not be trained on."""

    item: str
    """Task and id."""
    texts: tuple[str, ...]
    """Searched by n-grams."""
    questions: tuple[str, ...] = ()
    """Searched as whole questions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingText:
    """One document to search."""

    text_id: str
    text: str
    questions: tuple[str, ...] = ()
    """The turns of a chat, each by itself; none for prose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """One item found in one document."""

    item: str
    text_id: str
    rule: str
    """``n-gram`` or ``question``."""
    excerpt: str
    """The words that both have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapReport:
    """What a scan found."""

    ngram_words: int
    num_items: int
    num_texts: int
    num_words: int
    leaks: tuple[Leak, ...]
    """The first leak of each item and rule."""
    leaking_texts: tuple[str, ...]
    """Every document with a leak, in order."""


def words_of(text: str) -> list[str]:
    """The words that are compared: compatibility forms composed, case folded, split at whatever is no letter or digit."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.lower() if text.isascii() else text.casefold())


def probes_of(items: Iterable[MultipleChoiceItem | GenerationItem | TextItem]) -> Iterator[Probe]:
    """What to look for of each item: prompts with their choices, user messages, whole held-out documents."""
    for item in items:
        if isinstance(item, MultipleChoiceItem):
            texts = tuple(item.prompt + choice for choice in item.choices)
            yield Probe(item=f"{item.task}/{item.item_id}", texts=texts, questions=(item.question or item.prompt,))
        elif isinstance(item, GenerationItem):
            asked = tuple(
                message["content"] for messages in item.wordings for message in messages if message["role"] == "user"
            )
            yield Probe(item=f"{item.task}/{item.item_id}", texts=asked, questions=asked)
        else:
            yield Probe(item=f"{item.source}/{item.text_id}", texts=(item.text,))


def training_text(text_id: str, ids: Sequence[int], tokenizer: TextTokenizer) -> TrainingText:
    """A tokenised example as text, with the turns between its special tokens as questions.

    A template writes roles as plain words after a special token, so a turn counts with and without such a first line.
    """
    turns: list[str] = []
    start = 0
    for at, number in enumerate([*ids, _UNKNOWN]):
        if number in tokenizer.special_ids or number == _UNKNOWN:
            if at > start:
                turns.append(tokenizer.decode(ids[start:at]))
            start = at + 1
    questions = list(turns)
    for turn in turns:
        first, line_feed, rest = turn.lstrip().partition("\n")
        if line_feed and first.strip().lower() in _ROLE_WORDS:
            questions.append(rest)
    return TrainingText(text_id=text_id, text="\n".join(turns), questions=tuple(questions))


def drop_leaks(dataset: Dataset, index: OverlapIndex, tokenizer: TextTokenizer) -> tuple[Dataset, OverlapReport]:
    """The examples of a tokenised data set (``read_data.py``) in which no evaluation item occurs.

    Returns:
        The rest of the data set, in order, and what was found in the whole of it; texts go by row number.
    """
    rows = enumerate(dataset.select_columns(["input_ids"]))
    report = index.scan(training_text(str(number), row["input_ids"], tokenizer) for number, row in rows)
    leaking = {int(number) for number in report.leaking_texts}
    return dataset.select([number for number in range(len(dataset)) if number not in leaking]), report


class OverlapIndex:
    """N-grams and questions of evaluation items, to search training text for."""

    def __init__(self, probes: Iterable[Probe], *, ngram_words: int = DEFAULT_NGRAM) -> None:
        """Reads the items.

        Raises:
            DataError: an n-gram of no words.
        """
        if ngram_words < 1:
            raise DataError(f"n-gram: got {ngram_words} words, expected at least 1 (13 is usual)")
        self.ngram_words = ngram_words
        self._items: list[str] = []
        # Words get numbers; a word that no item has is -1, and no n-gram with it can match.
        self._vocabulary: dict[str, int] = {}
        self._ngrams: dict[bytes, _Owners] = {}
        self._questions: dict[tuple[str, ...], _Owners] = {}
        for probe in probes:
            self._add(len(self._items), probe)
            self._items.append(probe.item)
        # A table of one byte for each hash value says which n-grams are worth looking up; about 1 in 32 is set.
        bits = max(10, min(26, (32 * len(self._ngrams)).bit_length()))
        self._shift = np.uint64(64 - bits)
        keys = np.frombuffer(b"".join(self._ngrams), dtype=np.intc).reshape(-1, ngram_words)
        self._maybe = np.zeros(1 << bits, dtype=np.bool_)
        self._maybe[_hashes(keys.T) >> self._shift] = True

    def __len__(self) -> int:
        """Number of items."""
        return len(self._items)

    def _add(self, number: int, probe: Probe) -> None:
        for text in probe.texts:
            ids = array("i", [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words_of(text)])
            for start in range(len(ids) - self.ngram_words + 1):
                _claim(self._ngrams, ids[start : start + self.ngram_words].tobytes(), number)
        for question in probe.questions:
            if words := tuple(words_of(question)):
                _claim(self._questions, words, number)

    def scan(self, texts: Iterable[TrainingText]) -> OverlapReport:
        """Search all training text; of each item and rule the first leak is kept."""
        found: dict[tuple[str, str], Leak] = {}
        leaking: dict[str, None] = {}
        num_texts = num_words = 0
        for text in texts:
            leaks, words = self._search(text)
            num_texts += 1
            num_words += words
            for leak in leaks:
                found.setdefault((leak.item, leak.rule), leak)
                leaking[leak.text_id] = None
        return OverlapReport(
            ngram_words=self.ngram_words,
            num_items=len(self),
            num_texts=num_texts,
            num_words=num_words,
            leaks=tuple(found.values()),
            leaking_texts=tuple(leaking),
        )

    def _search(self, text: TrainingText) -> tuple[list[Leak], int]:
        """Leaks in one document and its number of words."""
        words = words_of(text.text)
        hits: dict[tuple[int, str], str] = {}
        for start, owners in self._ngram_hits(words):
            excerpt = " ".join(words[start : start + self.ngram_words])
            for item in _each(owners):
                hits.setdefault((item, "n-gram"), excerpt)
        for question in text.questions:
            turn = tuple(words_of(question))
            if (asked := self._questions.get(turn)) is not None:
                for item in _each(asked):
                    hits.setdefault((item, "question"), " ".join(turn))
        leaks = [
            Leak(item=self._items[item], text_id=text.text_id, rule=rule, excerpt=excerpt)
            for (item, rule), excerpt in hits.items()
        ]
        return leaks, len(words)

    def _ngram_hits(self, words: Sequence[str]) -> Iterator[tuple[int, _Owners]]:
        """Places of n-grams that an item has, and which items have them."""
        if len(words) < self.ngram_words or not self._ngrams:
            return
        number_of = self._vocabulary.get
        ids = np.fromiter((number_of(word, _UNKNOWN) for word in words), dtype=np.intc, count=len(words))
        num = len(ids) - self.ngram_words + 1
        hashes = _hashes([ids[offset : offset + num] for offset in range(self.ngram_words)])
        starts = np.flatnonzero(self._maybe[hashes >> self._shift])
        lookup = self._ngrams.get
        for start in starts.tolist():
            owners = lookup(ids[start : start + self.ngram_words].tobytes())
            if owners is not None:
                yield start, owners


def _hashes(columns: Iterable[npt.NDArray[np.intc]]) -> npt.NDArray[np.uint64]:
    """Hashes of n-grams, 64 bits, given the numbers of their first words, of their second words, and so on."""
    total: npt.NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
    for column in columns:
        total = (total + column.astype(np.uint64) + np.uint64(2)) * _MULTIPLIER
    return total


def _claim(index: dict[_Key, _Owners], key: _Key, number: int) -> None:
    """Note that an item has this key."""
    owners: tuple[int, ...] = _each(index.get(key, ()))
    if number not in owners:
        index[key] = (*owners, number) if owners else number


def _each(owners: _Owners) -> tuple[int, ...]:
    return (owners,) if isinstance(owners, int) else owners
