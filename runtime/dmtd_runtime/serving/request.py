"""A request: its sequences, what they have produced, and how its reader hears of it.

The worker's thread writes, one reader takes pieces. A piece is what a sequence has made since its last one: nothing but a place
in the output is kept for a reader, so one that is slow costs no memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dmtd_runtime.errors import DmtdError
from dmtd_runtime.sampling.grammar import Grammar
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Choice, Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.outputs import CompletionOutput, Delta, RequestMetrics, RequestOutput, TokenLogprob
from dmtd_runtime.serving.sequence import FinishReason, SequenceRun, TokenEvent
from dmtd_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger("dmtd.serving")


@dataclass(slots=True)
class _Taken:
    """How much of an output its reader has, and when the last of the output was made."""

    chars: int = 0
    tokens: int = 0
    logprobs: int = 0
    at_s: float = 0.0


class Request:
    """One prompt with its ``n`` sequences.

    ``notify`` is called by the worker's thread whenever there is something to take; set it before the request is submitted.
    Without one, :meth:`wait` and :meth:`deltas` wait in the caller's thread.
    """

    def __init__(
        self,
        *,
        request_id: str,
        prompt: str | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        room: int,
        tokenizer: Tokenizer | None,
        grammar: Grammar | None,
        deadline: float | None,
        priority: int,
        cache_salt: str | None,
        score_from: int | None,
        min_confidence: float,
        closing: Callable[[], bool],
    ) -> None:
        self.request_id = request_id
        self._prompt, self._prompt_ids = prompt, list(prompt_ids)
        self._closing = closing
        self._cancelled: FinishReason | None = None
        self._error: DmtdError | None = None
        self._submitted, self._metrics = time.monotonic(), RequestMetrics()
        self._outputs = [_no_tokens_yet(index, params) for index in range(params.n)]
        self._open = params.n
        self._lock = threading.Lock()  # of the outputs and of what is taken; held for a moment by either side
        self._taken = [_Taken() for _ in self._outputs]
        self._fresh: dict[int, None] = {}  # sequences with something to take, those that have waited longest first
        self._news, self._done = threading.Event(), threading.Event()
        self.notify: Callable[[], None] = self._news.set

        def sequence(index: int) -> SequenceRun:
            text = tokenizer.text_stream(skip_special_tokens=params.skip_special_tokens) if tokenizer else None
            return SequenceRun(
                ids=list(prompt_ids),
                sampler=Sampler(
                    params,
                    vocab_size=vocab_size,
                    prompt_ids=prompt_ids,
                    seed=seed,
                    sequence=index,
                    eos_token_ids=eos_token_ids,
                    form=grammar.start() if grammar else None,
                ),
                stops=StopRules(params, eos_token_ids=eos_token_ids, room=room, text=text),
                on_event=lambda event: self._take_in(index, event),
                cancelled=self._reason_to_stop,
                deadline=deadline,
                priority=priority,
                cache_salt=cache_salt,
                group=id(self) if params.n > 1 else 0,
                prompt_len=score_from or len(prompt_ids),
                min_confidence=min_confidence,
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
            )

        self.sequences = [sequence(index) for index in range(params.n)]

    @property
    def finished(self) -> bool:
        """Whether all sequences ended."""
        return self._done.is_set()

    @property
    def first_token_s(self) -> float | None:
        """Seconds from submission to the first token of any sequence; None before it."""
        return self._metrics.first_token_s

    def cancel(self, reason: FinishReason) -> None:
        """Let the request end before its next step. Takes no lock, so that a finalizer may call it."""
        self._cancelled = self._cancelled or reason

    def wait(self) -> None:
        """Block until all sequences ended."""
        self._done.wait()

    def result(self) -> RequestOutput:
        """The request as it is when all sequences have ended; raises the error that ended it."""
        if self._error is not None:
            raise self._error
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_ids,
            outputs=self._outputs,
            prompt_logprobs=self.prompt_logprobs(),
            metrics=self._metrics,
        )

    def take(self) -> Delta | None:
        """What a sequence has made and nobody has taken; None if there is nothing. Does not wait."""
        with self._lock:
            if not self._fresh:
                return None
            index = next(iter(self._fresh))
            del self._fresh[index]
            output, taken = self._outputs[index], self._taken[index]
            logprobs = output.logprobs or []
            delta = Delta(
                request_id=self.request_id,
                index=index,
                text=output.text[taken.chars :],
                token_ids=tuple(output.token_ids[taken.tokens :]),
                at_s=taken.at_s,
                logprobs=tuple(logprobs[taken.logprobs :]),
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
            )
            taken.chars, taken.tokens, taken.logprobs = len(output.text), len(output.token_ids), len(logprobs)
            return delta

    def deltas(self) -> Iterator[Delta]:
        """Pieces as they come, until all sequences ended; raises the error that ended the request."""
        finished = False
        while not finished:
            self._news.wait()
            self._news.clear()
            finished = self.finished  # before the last pieces are taken
            while (delta := self.take()) is not None:
                yield delta
        if self._error is not None:
            raise self._error

    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """Those of the prompt's tokens, where they were asked for: all of them from the first piece on."""
        first = self.sequences[0]
        if first.prompt_logprobs is None:
            return None
        return [None if choice is None else _logprob(choice) for choice in first.prompt_choices]

    def _reason_to_stop(self) -> FinishReason | None:
        return "abort" if self._closing() else self._cancelled

    def _take_in(self, index: int, event: TokenEvent) -> None:
        now = time.monotonic() - self._submitted
        output = self._outputs[index]
        with self._lock:
            if event.choice is not None:
                self._add(index, event.choice, now)
            output.text += event.text
            output.finish_reason, output.stop_reason = event.finish_reason, event.stop_reason
            self._taken[index].at_s = now
            if event.error is None:
                self._fresh[index] = None
        if event.finish_reason or event.error:
            self._end_one(now, event.error)
        try:
            self.notify()
        except Exception:
            logger.exception("%s: its reader cannot be told of it any more; it ends", self.request_id)
            self.cancel("abort")

    def _add(self, index: int, choice: Choice, now: float) -> None:
        output = self._outputs[index]
        if self._metrics.first_token_s is None:
            self._metrics.first_token_s = now
            started = self.sequences[index].started
            self._metrics.queued_s = (started - self._submitted) if started is not None else 0.0
        output.token_ids.append(choice.token_id)
        if output.logprobs is not None and choice.logprob is not None:
            output.logprobs.append(_logprob(choice))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + choice.logprob

    def _end_one(self, now: float, error: DmtdError | None) -> None:
        self._open -= 1
        if error is not None:
            self._error = self._error or error
            self.cancel("abort")  # one sequence failed: its siblings need not go on
        if self._open == 0:
            started = [sequence for sequence in self.sequences if sequence.started is not None]
            self._metrics.finished_s = now
            self._metrics.cached_tokens = min((sequence.cached_tokens for sequence in started), default=0)
            for name in ("full_passes", "late_steps", "dropped_tokens"):
                setattr(self._metrics, name, sum(getattr(sequence, name) for sequence in started))
            self._done.set()


def _logprob(choice: Choice) -> TokenLogprob:
    assert choice.logprob is not None, "its log probability was asked for"
    return TokenLogprob(token_id=choice.token_id, logprob=choice.logprob, top=choice.top_logprobs)


def _no_tokens_yet(index: int, params: SamplingParams) -> CompletionOutput:
    return CompletionOutput(index=index, logprobs=None if params.logprobs is None else [], cumulative_logprob=None)
