"""A request: its sequences, what they have produced, and the way events of the worker's thread reach the caller's."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from dmtd_runtime.errors import DmtdError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.sampler import Sampler
from dmtd_runtime.sampling.stops import StopRules
from dmtd_runtime.serving.outputs import CompletionOutput, Delta, RequestMetrics, RequestOutput, TokenLogprob
from dmtd_runtime.serving.sequence import FinishReason, SequenceRun, TokenEvent
from dmtd_runtime.text.tokenizer import Tokenizer


class Request:
    """One prompt with its ``n`` sequences. The worker's thread writes, the caller's waits or reads pieces."""

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
        deadline: float | None,
        closing: Callable[[], bool],
    ) -> None:
        self.request_id = request_id
        self._prompt = prompt
        self._prompt_ids = list(prompt_ids)
        self._params = params
        self._closing = closing
        self._cancelled: FinishReason | None = None
        self._error: DmtdError | None = None
        self._submitted = time.monotonic()
        self._metrics = RequestMetrics()
        self._pieces: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._outputs = [
            CompletionOutput(index=index, logprobs=None if params.logprobs is None else [], cumulative_logprob=None)
            for index in range(params.n)
        ]
        self._open = params.n
        self.sequences = [
            SequenceRun(
                ids=list(prompt_ids),
                sampler=Sampler(
                    params,
                    vocab_size=vocab_size,
                    prompt_ids=prompt_ids,
                    seed=seed,
                    sequence=index,
                    eos_token_ids=eos_token_ids,
                ),
                stops=StopRules(
                    params,
                    eos_token_ids=eos_token_ids,
                    room=room,
                    text=tokenizer.text_stream(skip_special_tokens=params.skip_special_tokens) if tokenizer else None,
                ),
                on_event=self._listener(index),
                cancelled=self._reason_to_stop,
                deadline=deadline,
            )
            for index in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        return self._done.is_set()

    def cancel(self, reason: FinishReason) -> None:
        """Let the request end before its next step."""
        self._cancelled = self._cancelled or reason

    def wait(self) -> None:
        """Block until all sequences ended."""
        self._done.wait()

    def result(self) -> RequestOutput:
        """The finished request; raises the error that ended it."""
        if self._error is not None:
            raise self._error
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_ids,
            outputs=self._outputs,
            metrics=self._metrics,
        )

    def deltas(self) -> Iterator[Delta]:
        """Pieces as they come, until all sequences ended; raises the error that ended the request."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        if self._error is not None:
            raise self._error

    def _reason_to_stop(self) -> FinishReason | None:
        return "abort" if self._closing() else self._cancelled

    def _listener(self, index: int) -> Callable[[TokenEvent], None]:
        return lambda event: self._take(index, event)

    def _take(self, index: int, event: TokenEvent) -> None:
        now = time.monotonic() - self._submitted
        output = self._outputs[index]
        logprobs: tuple[TokenLogprob, ...] = ()
        if event.choice is not None:
            if self._metrics.first_token_s is None:
                self._metrics.first_token_s = now
                started = self.sequences[index].started
                self._metrics.queued_s = (started - self._submitted) if started is not None else 0.0
            output.token_ids.append(event.choice.token_id)
            if output.logprobs is not None and event.choice.logprob is not None:
                logprob = TokenLogprob(
                    token_id=event.choice.token_id, logprob=event.choice.logprob, top=event.choice.top_logprobs
                )
                logprobs = (logprob,)
                output.logprobs.append(logprob)
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprob.logprob
        output.text += event.text
        output.finish_reason = event.finish_reason
        output.stop_reason = event.stop_reason
        self._error = self._error or event.error
        self._pieces.put(
            Delta(
                request_id=self.request_id,
                index=index,
                text=event.text,
                token_ids=() if event.choice is None else (event.choice.token_id,),
                at_s=now,
                logprobs=logprobs,
                finish_reason=event.finish_reason,
                stop_reason=event.stop_reason,
            )
        )
        if event.finish_reason or event.error:
            self._end_one(now, failed=event.error is not None)

    def _end_one(self, now: float, *, failed: bool) -> None:
        self._open -= 1
        if failed:
            self.cancel("abort")  # one sequence failed: its siblings need not go on
        if self._open == 0:
            self._metrics.finished_s = now
            self._pieces.put(None)
            self._done.set()
