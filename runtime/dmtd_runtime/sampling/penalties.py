"""What the penalties of ``Sampler`` (rule 3 in sampler.py) need of one sequence: which tokens were seen, and how often."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling.params import SamplingParams

Logits = NDArray[np.float32]


class Penalties:
    """Which tokens were seen, and how often: work per step grows with the distinct tokens, not with the vocabulary."""

    def __init__(self, params: SamplingParams, *, vocab_size: int, prompt_ids: Sequence[int]) -> None:
        self._repetition = np.float32(params.repetition_penalty)
        self._presence = np.float32(params.presence_penalty)
        self._frequency = np.float32(params.frequency_penalty)
        self._counts = np.zeros(vocab_size, np.int32)
        self._output = _IdSet(vocab_size)
        self._all = _IdSet(vocab_size)
        if params.repetition_penalty != 1:
            for token_id in np.unique(np.asarray(prompt_ids, np.int64)).tolist():
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"got token id {token_id}, expected ids from 0 to {vocab_size - 1}", param="prompt"
                    )
                self._all.add(token_id)

    @classmethod
    def for_request(cls, params: SamplingParams, *, vocab_size: int, prompt_ids: Sequence[int]) -> "Penalties | None":
        """None where no penalty is asked, so that the common case pays nothing."""
        if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0):
            return None
        return cls(params, vocab_size=vocab_size, prompt_ids=prompt_ids)

    def observe(self, token_id: int) -> None:
        self._counts[token_id] += 1
        self._output.add(token_id)
        self._all.add(token_id)

    def fill(self, seen: NDArray[np.generic], counts: NDArray[np.generic]) -> None:
        """Write what was seen (prompt and output) and how often it was generated, both [vocab]."""
        seen[self._all.ids] = True
        counts[:] = self._counts

    def apply(self, logits: Logits) -> None:
        """Rule 3, in place."""
        if self._repetition != 1:
            ids = self._all.ids
            values = logits[ids]
            with np.errstate(over="ignore"):  # choose() refuses an infinite winner
                logits[ids] = np.where(values > 0, values / self._repetition, values * self._repetition)
        if self._presence != 0 or self._frequency != 0:
            ids = self._output.ids
            logits[ids] -= self._frequency * self._counts[ids].astype(np.float32) + self._presence


class _IdSet:
    """Distinct token ids as an array that grows."""

    def __init__(self, vocab_size: int) -> None:
        self._seen = np.zeros(vocab_size, np.bool_)
        self._ids = np.empty(256, np.int64)
        self._size = 0

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self._size]

    def add(self, token_id: int) -> None:
        if self._seen[token_id]:
            return
        self._seen[token_id] = True
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[self._size] = token_id
        self._size += 1
