"""Shards of JSON lines and the state that counts them: what a stopped ``answers`` run goes on from.

A shard is written whole, then the state beside it: a shard that the state does not count is written anew. Runs with
different seeds share a directory without touching each other's files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

from dmtd_errors.words import reason
from dmtd_models.errors import ModelError


class AnswersError(ModelError):
    """Training text that cannot be written."""


class Document(TypedDict):
    """One line of a shard."""

    index: int  # of its prompt
    kind: str
    prompt_ids: list[int]  # the whole rendered prompt
    answer_ids: list[int]
    finish: Literal["stop", "length"]


@dataclass(slots=True, kw_only=True)
class RunState:
    """What a resumed run must know."""

    next_index: int = 0
    pending: list[int] = field(default_factory=list)  # begun but in no shard
    shards: int = 0
    documents: int = 0
    answer_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


class ShardStore:
    """The files of one seed in one directory."""

    def __init__(self, directory: Path, *, seed: int, options: Mapping[str, object]) -> None:
        """Make the directory if it is missing.

        Args:
            directory: where the shards lie.
            seed: part of every file's name.
            options: what must be the same for a run to go on; JSON values.
        """
        self._directory = directory
        self._seed = seed
        self._options = json.loads(json.dumps(options))
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AnswersError(
                f"{directory}: {reason(error)}, expected a directory to write into; give another"
            ) from error

    def shard(self, number: int) -> Path:
        """The file of one shard, from 0."""
        return self._directory / f"answers-{self._seed}-{number:05}.jsonl"

    def load(self) -> RunState:
        """The committed state; a new one if nothing is committed.

        Raises:
            AnswersError: what is there was written with other options, or is no state.
        """
        file = self._state_file()
        if not file.exists():
            return RunState()
        try:
            recorded = json.loads(file.read_text())
            state, options = RunState(**recorded["state"]), recorded["options"]
        except (ValueError, KeyError, TypeError) as error:
            raise AnswersError(
                f"{file}: got {error!r}, expected the state of a run; give another seed or directory"
            ) from error
        if options != self._options:
            raise AnswersError(
                f"{file}: got documents written with other options, expected the same on resuming; "
                "give another seed or another directory"
            )
        return state

    def documents(self, state: RunState) -> Iterator[Document]:
        """Those of the committed shards."""
        for number in range(state.shards):
            with self.shard(number).open() as lines:
                for line in lines:
                    yield json.loads(line)

    def commit(self, documents: Sequence[Document], state: RunState) -> None:
        """Write a shard and count it in ``state``.

        Raises:
            AnswersError: the file system refuses; what was committed before stays good.
        """
        shard = self.shard(state.shards)
        try:
            _replace(shard, "".join(json.dumps(document) + "\n" for document in documents))
            state.shards += 1
            state.documents += len(documents)
            state.answer_tokens += sum(len(document["answer_ids"]) for document in documents)
            _replace(self._state_file(), json.dumps({"options": self._options, "state": asdict(state)}))
        except OSError as error:
            raise AnswersError(
                f"{shard}: {reason(error)}, expected to write a shard; make room and run again: it goes on from "
                f"{self._state_file().name}"
            ) from error

    def _state_file(self) -> Path:
        return self._directory / f".answers-{self._seed}.json"


def _replace(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    part.replace(file)
