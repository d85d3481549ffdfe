"""The sampling options of generate and chat, and how they become ``SamplingParams``.

An option that is not given keeps the value of the bundle's generation_config.json, then that of ``SamplingParams``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from dmtd_errors.words import reason
from dmtd_runtime.cli.common import note
from dmtd_runtime.cli.options.groups import Group, option
from dmtd_runtime.errors import RequestError
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.sampling.structured import StructuredOutputs

_PANEL = "Sampling (by default as the bundle's generation_config.json says)"


def _option(text: str, *flags: str) -> Any:
    return option(text, *flags, panel=_PANEL, show_default=False)


def _form(text: str, *flags: str) -> Any:
    return option(text, *flags, panel="Form of the answer, one of these (extra: structured)", show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenSampling:
    """What was given on the command line; None, False: not given."""

    greedy: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: str | None = None
    ignore_eos: bool = False
    logit_bias: str | None = None
    min_confidence: float | None = None
    json_schema: str | None = None
    regex: str | None = None
    choice: list[str] | None = None

    def over(self, defaults: SamplingParams, *, plain: bool = False) -> SamplingParams:
        """``defaults`` with what was given; ``plain``: for plain decoding.

        Raises:
            RequestError: values out of range, or two that contradict each other.
        """
        if self.greedy and self.temperature:
            raise RequestError(
                f"got {self.temperature:g} with --greedy, which is 0; give one of them", param="temperature"
            )
        given: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        given["temperature"] = 0.0 if given.pop("greedy") else self.temperature
        given["stop_token_ids"] = parse_ids(self.stop_token_ids, "stop_token_ids")
        given["logit_bias"] = _parse_logit_bias(self.logit_bias)
        form = {
            "json": _read_schema(given.pop("json_schema")),
            "regex": given.pop("regex"),
            "choice": given.pop("choice"),
        }
        form = {name: value for name, value in form.items() if value not in (None, [])}
        given["structured_outputs"] = StructuredOutputs(**form) if form else None
        changes = {
            name: value for name, value in given.items() if value is not None and value is not False and value != []
        }
        if self.max_tokens is not None and self.min_tokens is None:  # what was asked for wins over what is recommended
            changes["min_tokens"] = min(defaults.min_tokens, self.max_tokens)
        params = replace(defaults, **changes)
        idle = [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "min_p", "seed") if name in changes]
        if params.greedy and idle:
            note(f"note: {', '.join(idle)} changes nothing at temperature 0; add --temperature 0.7, say")
        if plain and self.min_confidence:
            note("note: --min-confidence changes nothing with --plain, where every token has a full pass")
        return params


SAMPLING = Group(
    {
        "greedy": _option("Always the likeliest token, as --temperature 0.", "--greedy"),
        "temperature": _option("Higher is more random. 0: always the likeliest token."),
        "top_p": _option("Choose among the fewest tokens whose probabilities reach this sum. 1: off."),
        "top_k": _option("Choose among this many likeliest tokens. 0: off."),
        "min_p": _option("Choose among tokens at least this share as likely as the likeliest. 0: off."),
        "presence_penalty": _option("Subtracted from the logits of tokens that were generated. 0: off."),
        "frequency_penalty": _option("Subtracted from a token's logit for each time it was generated. 0: off."),
        "repetition_penalty": _option("Above 1, repeats become less likely. 1: off."),
        "seed": _option("The same seed gives the same tokens. By default another each time."),
        "max_tokens": _option("Most new tokens. By default until the model ends the sequence."),
        "min_tokens": _option("The sequence does not end before this many tokens. By default 0."),
        "stop": _option("A string that ends the text. May be given again. By default none.", "--stop"),
        "stop_token_ids": _option(
            "Token ids that end the sequence, such as 1,2,3. By default none.", "--stop-token-ids"
        ),
        "ignore_eos": _option("Go on after an end-of-sequence token. By default off.", "--ignore-eos"),
        "json_schema": _form("A JSON schema, or a file that holds one: the answer is JSON that satisfies it."),
        "regex": _form("A regular expression that matches the whole answer."),
        "choice": _form("The whole answer is this. May be given again: then it is one of them.", "--choice"),
        "min_confidence": _option(
            "Where a late step is less sure than this of its likeliest token, its cycle ends, and 0.4 below this a full pass "
            "chooses there: slower, and closer to the plain model. 0: cycles of fixed length; 1: a full pass for every token."
        ),
        "logit_bias": _option(
            'Added to the logits of tokens: JSON, such as {"50": -100}. By default none.', "--logit-bias"
        ),
    }
)
GenerateSampling = Annotated[GivenSampling, SAMPLING]
ChatSampling = Annotated[
    GivenSampling,
    SAMPLING.only(
        *("greedy", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "stop"),
        "min_confidence",
    ),
]


def parse_ids(text: str | None, param: str) -> list[int] | None:
    """Token ids written with commas or spaces."""
    if text is None:
        return None
    try:
        return [int(part) for part in re.split(r"\s*,\s*|\s+", text.strip())] if text.strip() else []
    except ValueError:
        raise RequestError(f"got {text[:60]!r}, expected whole numbers such as 1,2,3", param=param) from None


def _parse_logit_bias(text: str | None) -> dict[int, Any] | None:
    """A JSON object of token ids and numbers."""
    try:
        return None if text is None else bias_by_id(json.loads(text))
    except json.JSONDecodeError:
        raise _no_bias(text) from None


def bias_by_id(value: object) -> dict[int, Any]:
    """A logit_bias with whole numbers for keys, which JSON cannot write.

    Raises:
        RequestError: no such object.
    """
    try:
        return {int(token_id): number for token_id, number in value.items()}  # type: ignore[attr-defined]
    except (ValueError, TypeError, AttributeError):
        raise _no_bias(json.dumps(value)) from None


def _no_bias(text: object) -> RequestError:
    return RequestError(f'got {str(text)[:60]!r}, expected JSON such as {{"50": -100}}', param="logit_bias")


def _read_schema(given: str | None) -> str | None:
    """The text of a schema: what was given, if that is JSON, or the file of that name."""
    if given is None or given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(
            f"got {given[:60]!r}, which is no JSON object and no file that can be read ({reason(error)}); give one of them",
            param="json_schema",
        ) from None
