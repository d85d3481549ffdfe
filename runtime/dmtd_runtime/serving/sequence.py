"""One sequence on its way through the loop: its tokens, how it chooses and ends, and whom it tells. No schedule, no tensor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dmtd_runtime.cycle import StepKind
from dmtd_runtime.errors import DmtdError
from dmtd_runtime.sampling.confidence import ALWAYS, Verdict, verdict
from dmtd_runtime.sampling.sampler import Choice, Logits, Sampler
from dmtd_runtime.sampling.stops import StopRules

logger = logging.getLogger("dmtd.serving")

FinishReason = Literal["stop", "length", "abort", "deadline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """What happened to a sequence: a token and the text it released, and the end of it if ``finish_reason`` is set.

    ``choice`` is None where the sequence was ended from outside; ``error`` is set where it failed.
    """

    choice: Choice | None
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: DmtdError | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceRun:
    """One sequence, equal to itself alone. ``ids`` grows by every chosen token."""

    ids: list[int]
    sampler: Sampler
    stops: StopRules
    on_event: Callable[[TokenEvent], None]
    cancelled: Callable[[], FinishReason | None] = lambda: None
    deadline: float | None = None  # of time.monotonic()
    priority: int = 0  # lower goes first
    cache_salt: str | None = None  # shares cached prefixes with sequences of the same salt alone
    group: int = 0  # those of one group have the same ids when they come; 0: nobody else
    # Where the reply begins; 0: all ids are prompt. Ids behind it are a reply that is given, not chosen.
    prompt_len: int = 0
    min_confidence: float = 0.0  # of a late step, below which its cycle ends
    prompt_logprobs: int | None = None  # of the ids given: log probabilities, and of so many likeliest tokens
    prompt_choices: list[Choice | None] = field(default_factory=list)  # what was asked so; the first token has none
    started: float | None = None  # when it left the queue
    cached_tokens: int = 0  # of the prompt, that came from the prefix cache, or from another one of the group
    full_passes: int = 0  # of its decoding, as those below
    late_steps: int = 0
    dropped_tokens: int = 0  # late steps whose choice was not kept
    ended: bool = False
    failed: bool = False

    @property
    def looks(self) -> bool:
        """Whether it matters how sure late steps are."""
        return 0 < self.min_confidence < ALWAYS

    def count(self, kind: StepKind) -> None:
        """Take a step as run."""
        self.full_passes += kind == "full"
        self.late_steps += kind == "late"

    def judge(self, confidence: float) -> Verdict:
        """What becomes of a late step that is so sure; dropped ones are counted."""
        found = verdict(confidence, self.min_confidence) if self.looks else "keep"
        self.dropped_tokens += found == "drop"
        return found

    def end_from_outside(self) -> bool:
        """End the sequence if it was cancelled or its deadline has passed; whether it did."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        reason = self.cancelled() or ("deadline" if late else None)
        if reason is None:
            return False
        self.tell(TokenEvent(choice=None, text=self.stops.flush(), finish_reason=reason))
        return True

    def choose(self, logits: Logits) -> None:
        """Take the next token from logits [vocab], and tell it."""
        self._take(lambda: self.sampler.choose(logits))

    def take(self, token_id: int) -> None:
        """Take the token that a device chose, negative where it had none to give, and tell it."""
        self._take(lambda: self.sampler.take(token_id))

    def tell(self, event: TokenEvent) -> None:
        """Hand an event on, and note the end. A listener that raises ends its own sequence, and nothing else."""
        self.failed = event.error is not None
        self.ended = self.failed or event.finish_reason is not None
        try:
            self.on_event(event)
        except Exception:
            logger.exception("a listener failed: its sequence ends")
            self.ended = True

    def _take(self, choose: Callable[[], Choice]) -> None:
        try:
            choice = choose()
            self.ids.append(choice.token_id)
            outcome = self.stops.push(choice.token_id, complete=self.sampler.complete)
        except DmtdError as error:
            self.tell(TokenEvent(choice=None, error=error))
            return
        except Exception as error:  # a bug in choosing or in making text: this sequence's alone, its neighbours go on
            logger.exception("a sequence failed")
            problem = f"the sequence failed at token {len(self.ids)}: {type(error).__name__}: {error}; please report it"
            self.tell(TokenEvent(choice=None, error=DmtdError(problem)))
            return
        self.tell(
            TokenEvent(
                choice=choice, text=outcome.text, finish_reason=outcome.finish_reason, stop_reason=outcome.stop_reason
            )
        )
