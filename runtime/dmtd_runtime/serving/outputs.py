"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmtd_runtime.serving.sequence import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A chosen token with its log probability under the model, and the likeliest alternatives, descending."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One of a request's ``n`` sequences."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """Seconds of one request, from its submission, what the prefix cache spared it, and the steps of its decoding.

    ``cached_tokens``: tokens of the prompt that none of its sequences computed, because earlier requests had. (Of ``n``
    sequences that is the least: what one of them computes, the others may find.) ``full_passes`` and ``late_steps`` are its
    sequences' own behind their prompts, whoever shared them; of ``dropped_tokens`` late steps the choice was not kept.
    """

    queued_s: float = 0.0
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0
    full_passes: int = 0
    late_steps: int = 0
    dropped_tokens: int = 0

    @property
    def tokens_per_full_pass(self) -> float | None:
        """Tokens behind the prompts' own passes, for each full pass; None where there was none."""
        kept = self.full_passes + self.late_steps - self.dropped_tokens
        return kept / self.full_passes if self.full_passes else None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A finished request.

    ``prompt_logprobs``: where they were asked for, one entry a token of the prompt; None for the first, which follows nothing.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of a streamed sequence: all text and tokens since the last piece. A reader that is slow gets larger ones.

    ``at_s``: seconds from the request's submission to when the worker made the last of it, however late it is read.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    at_s: float
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
