"""A body's sampling fields become ``SamplingParams``, over the bundle's defaults and within the server's limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling.params import MIN_TEMPERATURE, SamplingParams
from dmtd_runtime.sampling.structured import StructuredOutputs
from dmtd_runtime.server.errors import ApiError, context_overflow, invalid
from dmtd_runtime.server.options import Limits
from dmtd_runtime.server.schema import ResponsesBody, SamplingBody

_SAME_NAME = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens", "include_stop_str_in_output"),
)

_NEEDS_LOGPROBS = "needs prompt_logprobs, or echo with logprobs: what it scores is told nowhere else"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Options of a request's sequences. ``copies``: choices that a sequence stands for (n > 1 at temperature 0).
    ``form``: the field that the answer's form was given in.
    """

    params: SamplingParams
    n: int = 1
    copies: int = 1
    score_from: int | None = None
    form: str = "structured_outputs"


def wanted_of(
    body: SamplingBody | ResponsesBody,
    defaults: SamplingParams,
    limits: Limits,
    *,
    max_tokens: tuple[str, int | None],
    logprobs: tuple[str, int | None],
    form: tuple[str, StructuredOutputs] | None = None,
) -> Wanted:
    """The options of a body; ``max_tokens`` and ``logprobs`` with the names of the fields that they stand in.

    Raises:
        ApiError: 400 with the field that is out of range.
    """
    given: dict[str, Any] = {name: value for name in _SAME_NAME if (value := getattr(body, name, None)) is not None}
    n = getattr(body, "n", 1)
    _check_limits(body, limits, n=n, max_tokens=max_tokens, logprobs=logprobs)
    if body.dmtd.score_from is not None and not body.scores_prompt:
        raise invalid("dmtd.score_from", _NEEDS_LOGPROBS)
    if body.dmtd.min_confidence is not None:
        given["min_confidence"] = body.dmtd.min_confidence
    given["logit_bias"] = _logit_bias(getattr(body, "logit_bias", None))
    given["logprobs"] = logprobs[1]
    given["prompt_logprobs"] = getattr(body, "prompt_logprobs", None)
    given["structured_outputs"] = None if form is None else form[1]
    given["max_tokens"] = _least(
        max_tokens[1] if max_tokens[1] is not None else defaults.max_tokens, limits.max_output_tokens
    )
    try:
        # One after another: what contradicts is then told by the name of what was given.
        greedy = given.get("temperature", defaults.temperature) < MIN_TEMPERATURE
        params = replace(defaults, **given, n=1 if greedy else n)
    except RequestError as error:
        renamed = {"max_tokens": max_tokens[0], "logprobs": logprobs[0], "min_confidence": "dmtd.min_confidence"}
        param = renamed.get(error.param or "", error.param)
        raise ApiError(400, f"{param}: {error.problem}", param=param) from None
    return Wanted(
        params=params,
        n=n,
        copies=n if greedy else 1,
        score_from=body.dmtd.score_from,
        form="structured_outputs" if form is None else form[0],
    )


def check_room(prompt_len: int, max_model_len: int, *, asked: tuple[str, int | None]) -> None:
    """Raise ApiError 400 if prompt and asked answer together do not fit."""
    name, count = asked
    if count is not None and prompt_len + count > max_model_len:
        raise context_overflow(prompt_len, max_model_len, param=name, asked=count)


def _check_limits(
    body: SamplingBody | ResponsesBody,
    limits: Limits,
    *,
    n: int,
    max_tokens: tuple[str, int | None],
    logprobs: tuple[str, int | None],
) -> None:
    stop = getattr(body, "stop", None) or ()
    strings = (stop,) if isinstance(stop, str) else stop
    _at_most("n", n, limits.max_n)
    _at_most(logprobs[0], logprobs[1] or 0, limits.max_logprobs)
    _at_most("prompt_logprobs", getattr(body, "prompt_logprobs", None) or 0, limits.max_logprobs)
    _at_most(max_tokens[0], max_tokens[1] or 0, limits.max_output_tokens)
    _at_most("stop", len(strings), limits.max_stop, "strings")
    _at_most("stop", max(map(len, strings), default=0), limits.max_stop_chars, "characters in a string")
    _at_most("logit_bias", len(getattr(body, "logit_bias", None) or ()), limits.max_logit_bias, "entries")


def _at_most(param: str, got: int, most: int | None, of: str = "") -> None:
    if most is not None and got > most:
        raise invalid(param, f"got {got} {of}".rstrip() + f", expected at most {most}, this server's limit")


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    try:
        return None if given is None else {int(token_id): value for token_id, value in given.items()}
    except ValueError:
        raise invalid("logit_bias", 'expected token ids as keys: {"50": -100}') from None
