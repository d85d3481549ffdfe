"""Teacher-forced decoding through the product's own loop: the tokens are given, every row of logits is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmtd_runtime.backends.base import Backend
from dmtd_runtime.cycle import CyclePlan, Position
from dmtd_runtime.sampling.confidence import Verdict
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Choice, Logits, Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.loop import run_batch
from dmtd_runtime.serving.sequence import SequenceRun, TokenEvent

Array = np.ndarray[Any, np.dtype[Any]]


class ForcedSampler(Sampler):
    """Keeps each row of logits, and gives the next of ``tokens``, or the likeliest where there are none."""

    def __init__(self, tokens: Sequence[int], *, params: SamplingParams, vocab_size: int) -> None:
        super().__init__(params, vocab_size=vocab_size, prompt_ids=(), seed=0)
        self.rows: list[Logits] = []
        self._tokens = tokens

    @property
    def needs_logits(self) -> bool:
        return True

    @property
    def needs_host(self) -> bool:
        return True  # so every step comes by here, whole cycles included

    def choose(self, logits: Logits) -> Choice:
        self.rows.append(logits.copy())
        token = self._tokens[len(self.rows) - 1] if self._tokens else int(logits.argmax())
        self.observe(token)
        return Choice(token_id=token)


@dataclass(slots=True, kw_only=True, eq=False)
class LeavingRun(SequenceRun):
    """Leaves its cycles so that ``leaves`` are heads, however sure its late steps are: every second one behind a late step
    that it keeps, where there is one, the others by taking the late step there back.
    """

    leaves: Sequence[int] = ()
    behind: int = -1  # the last of them that comes behind a step that was kept

    @property
    def looks(self) -> bool:
        return bool(self.leaves)

    def judge(self, confidence: float) -> Verdict:
        at = len(self.ids) - 1
        if at in self.leaves and at != self.behind:
            return "drop"
        if at + 1 not in self.leaves[1::2]:
            return "keep"
        self.behind = at + 1
        return "leave"


def forced_logits(
    backend: Backend,
    plan: CyclePlan,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    num_new: Sequence[int],
    *,
    vocab_size: int,
    max_rows: int,
    leaves: Sequence[Sequence[int]] = (),
    on_caches: Callable[[int, Array], None] | None = None,
) -> list[Array]:
    """Logits [num_new, vocab] of some sequences, run as one batch.

    Args:
        backend: with a slot for each.
        plan: the law of the cycles.
        prompts: token ids.
        continuations: the tokens to feed; an empty one feeds what the logits like best.
        num_new: rows of logits of each.
        vocab_size: width of a row.
        max_rows: of a prompt's chunk.
        leaves: positions of each that are heads before their cycle's end; none by default.
        on_caches: is told of each sequence, by its number, what stands in its caches at its end, [2 * layers, kv_heads, rows,
            head_dim]; zeros in rows that T has not got to.

    Raises:
        BackendError: the backend failed.
    """
    samplers, sequences, told = [], [], list[TokenEvent]()
    leaves = leaves or [()] * len(prompts)
    for prompt, tokens, count, left in zip(prompts, continuations, num_new, leaves, strict=True):
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count)
        samplers.append(ForcedSampler(tokens, params=params, vocab_size=vocab_size))
        run = LeavingRun(
            ids=list(prompt), sampler=samplers[-1], stops=StopRules(params), on_event=told.append, leaves=left
        )
        sequences.append(run)

    def leaving(sequence: SequenceRun, slot: int, at: Position) -> None:
        if on_caches is not None:
            [rows] = backend.read_rows(slot, range(0, at.fed, at.fed))
            thinking = plan.cycle.thinking_range
            rows[2 * thinking.start : 2 * thinking.stop, :, at.thought :] = 0
            on_caches(next(i for i, one in enumerate(sequences) if one is sequence), rows)

    run_batch(backend, plan, sequences, max_rows=max_rows, leaving=leaving)
    for event in told:
        if event.error is not None:
            raise event.error
    return [np.stack(sampler.rows) for sampler in samplers]


def chosen_tokens(
    backend: Backend,
    plan: CyclePlan,
    prompts: Sequence[Sequence[int]],
    num_new: Sequence[int],
    *,
    vocab_size: int,
    max_rows: int,
) -> list[list[int]]:
    """The likeliest tokens of some sequences, run as one batch in whatever way the backend is quickest. See above."""
    sequences, told = [], list[TokenEvent]()
    for prompt, count in zip(prompts, num_new, strict=True):
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count)
        sampler = Sampler(params, vocab_size=vocab_size, prompt_ids=prompt, seed=0)
        sequences.append(SequenceRun(ids=list(prompt), sampler=sampler, stops=StopRules(params), on_event=told.append))
    run_batch(backend, plan, sequences, max_rows=max_rows)
    for event in told:
        if event.error is not None:
            raise event.error
    return [sequence.ids[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]
