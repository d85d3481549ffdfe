"""What a request asks of the token choice: ``SamplingParams``, checked once, when it is made.

Flow: the user's options -> ``SamplingParams`` -> for each sequence one ``Sampler`` (sampler.py), one ``StopRules``
(stops.py). The names and meanings are those of vLLM. Nothing here touches logits, text or the model; whether the prompt
fits is ``LLM``'s question.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from dmtd_runtime.errors import BundleError, RequestError
from dmtd_runtime.sampling.structured import PARAM as STRUCTURED_OUTPUTS
from dmtd_runtime.sampling.structured import StructuredOutputs

MAX_N = 128
MAX_TEMPERATURE = 100.0
MIN_TEMPERATURE = 1e-5
"""Below this the temperature counts as 0 (greedy): the distribution is one token wide long before."""
MAX_TOP_K = 1 << 20
MAX_PENALTY = 2.0
"""Presence and frequency penalties lie within [-MAX_PENALTY, MAX_PENALTY]."""
MAX_REPETITION_PENALTY = 100.0
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_TOKENS = 1 << 20
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_TOKEN_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends.

    Attributes:
        n: Sequences to generate for one prompt.
        temperature: 0 is greedy: the most likely token, of equals the one with the lowest id.
        top_p: Keep the fewest most likely tokens whose probabilities reach this sum; 1 is off.
        top_k: Keep this many most likely tokens; 0 and -1 are off (``sampler.MAX_CANDIDATES`` bounds every draw).
        min_p: Keep tokens at least this share as likely as the most likely one; 0 is off.
        presence_penalty: Subtracted from the logit of every token already generated.
        frequency_penalty: Subtracted once for every time the token was generated.
        repetition_penalty: Above 1, tokens of the prompt and the output become less likely; 1 is off.
        seed: The same seed, prompt and bundle give the same tokens; None lets the engine draw one.
        stop: A string or strings that end the sequence.
        stop_token_ids: Token ids that end the sequence, beside the model's end-of-sequence ids.
        ignore_eos: Go on after an end-of-sequence id.
        max_tokens: Most tokens to generate; None: until end of sequence or the model's length.
        min_tokens: End-of-sequence and stop ids are masked, and stop strings ignored, for this many tokens.
        logprobs: None: no log probabilities; 0: the chosen token's; k: also those of the k most likely tokens.
        prompt_logprobs: The same of the prompt's own tokens, in the output's ``prompt_logprobs``; the prompt is then read whole.
        logit_bias: Token id -> number added to its logit.
        structured_outputs: The form that the whole answer has. Where it is complete the sequence ends; end-of-sequence ids
            come only where it may end, with ``ignore_eos`` or before ``min_tokens`` only where nothing else may follow.
        min_confidence: Where a late step gives its likeliest token a probability below this, its cycle ends: the next position
            is a full pass. 0.4 below this a full pass chooses in its place. More is quality for speed. 0: cycles have their
            fixed length; 1: a full pass for every token.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string (or the text of the stop token) in the text.

    Raises:
        RequestError: A value of the wrong type or out of its range, or two values that contradict each other.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    structured_outputs: StructuredOutputs | None = None
    min_confidence: float = 0.0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "n": _integer("n", self.n, 1, MAX_N),
            "temperature": _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0, low_open=True),
            "top_k": _integer("top_k", self.top_k, -1, MAX_TOP_K),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, 0.0, MAX_REPETITION_PENALTY, low_open=True
            ),
            "seed": None if self.seed is None else _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "max_tokens": None if self.max_tokens is None else _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS),
            "min_tokens": _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS),
            "logprobs": None if self.logprobs is None else _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            "prompt_logprobs": None
            if self.prompt_logprobs is None
            else _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
            "logit_bias": _logit_bias(self.logit_bias),
            "min_confidence": _number("min_confidence", self.min_confidence, 0.0, 1.0),
        }
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            checked[name] = _boolean(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._refuse_contradictions()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without chance."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, whatever form it was given in."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def validate_for(self, vocab_size: int) -> None:
        """Checks the token ids named here against a model.

        Args:
            vocab_size: Number of logits the model gives.

        Raises:
            RequestError: An id that the model does not have.
        """
        ids = [("stop_token_ids", token_id) for token_id in self.stop_token_ids]
        ids += [("logit_bias", token_id) for token_id in self.logit_bias or ()]
        for name, token_id in ids:
            if token_id >= vocab_size:
                raise RequestError(
                    f"got token id {token_id}, expected ids from 0 to {vocab_size - 1}; "
                    "take ids from this model's tokenizer",
                    param=name,
                )

    @staticmethod
    def from_generation_config(
        raw: Mapping[str, Any], *, ignored: Callable[[str], None] = lambda line: None
    ) -> "SamplingParams":
        """Reads a model's recommended options from the content of its generation_config.json.

        Without ``do_sample: true`` the model asks for greedy decoding, and a value that only sampling would read is left out
        where it is none of ours. Keys that say nothing about sampling are ignored; options that are absent or null keep the
        defaults of this class.

        Args:
            raw: The parsed file.
            ignored: Told of every value that is left out, in one line.

        Raises:
            BundleError: A value out of its range that would be used.
        """
        names = {
            "top_p": "top_p",
            "top_k": "top_k",
            "min_p": "min_p",
            "repetition_penalty": "repetition_penalty",
            "max_new_tokens": "max_tokens",
            "min_new_tokens": "min_tokens",
            "min_confidence": "min_confidence",
        }
        given = {ours: _whole(raw[theirs]) for theirs, ours in names.items() if raw.get(theirs) is not None}
        sampled = raw.get("do_sample") is True
        given["temperature"] = (1.0 if raw.get("temperature") is None else raw["temperature"]) if sampled else 0.0
        for name in ("top_p", "top_k", "min_p"):
            if sampled or name not in given:
                continue
            try:
                SamplingParams(**{name: given[name]})
            except RequestError as error:
                ignored(f"generation_config.json: {error}; ignored, as do_sample is not true")
                del given[name]
        try:
            params = SamplingParams(**{**given, "min_tokens": 0})
            least = SamplingParams(min_tokens=given.get("min_tokens", 0)).min_tokens
        except RequestError as error:
            raise BundleError(f"generation_config.json: {error}; correct the file") from error
        return replace(params, min_tokens=least if params.max_tokens is None else min(least, params.max_tokens))

    def _refuse_contradictions(self) -> None:
        form = self.structured_outputs
        if form is not None and not isinstance(form, StructuredOutputs):
            raise RequestError(
                f"got {_shown(form)}, expected StructuredOutputs(json=...), say", param=STRUCTURED_OUTPUTS
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"got {self.min_tokens} with max_tokens {self.max_tokens}, expected at most max_tokens; "
                "lower min_tokens or raise max_tokens",
                param="min_tokens",
            )
        if self.greedy and self.n > 1:
            raise RequestError(
                f"got {self.n} with temperature 0, expected 1 (greedy sequences would all be the same); "
                "set a temperature above 0",
                param="n",
            )


def _whole(value: Any) -> Any:
    """50.0, as some files write 50."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"got {_shown(value)}, expected a whole number from {low} to {high}", param=name)
    number = int(value)
    if not low <= number <= high:
        raise RequestError(f"got {_shown(number)}, expected {low} to {high}", param=name)
    return number


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> float:
    expected = f"a finite number {f'above {low:g} up to' if low_open else f'from {low:g} to'} {high:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"got {_shown(value)}, expected {expected}", param=name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # NaN fails every comparison, infinity is above every limit.
    if not (low < number if low_open else low <= number) or not number <= high:
        raise RequestError(f"got {_shown(value)}, expected {expected}", param=name)
    return number


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"got {_shown(value)}, expected true or false", param=name)
    return value


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or isinstance(strings, bytes | bytearray):
        raise RequestError(f"got {_shown(stop)}, expected a string or a list of strings", param="stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"got {len(strings)} strings, expected at most {MAX_STOP_STRINGS}", param="stop")
    for string in strings:
        if not isinstance(string, str):
            raise RequestError(f"got {_shown(string)}, expected a string or a list of strings", param="stop")
        if not string:
            raise RequestError("got an empty string, expected at least one character; leave it out", param="stop")
        if len(string) > MAX_STOP_STRING_CHARS:
            raise RequestError(
                f"got a string of {len(string)} characters, expected at most {MAX_STOP_STRING_CHARS}", param="stop"
            )
    return tuple(strings)


def _stop_token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray):
        raise RequestError(f"got {_shown(ids)}, expected a list of token ids", param="stop_token_ids")
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(f"got {len(ids)} ids, expected at most {MAX_STOP_TOKEN_IDS}", param="stop_token_ids")
    return tuple(_integer("stop_token_ids", token_id, 0, MAX_TOKEN_ID) for token_id in ids)


def _logit_bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise RequestError(f"got {_shown(bias)}, expected a mapping from token id to number", param="logit_bias")
    if len(bias) > MAX_LOGIT_BIAS_ENTRIES:
        raise RequestError(f"got {len(bias)} entries, expected at most {MAX_LOGIT_BIAS_ENTRIES}", param="logit_bias")
    checked = {
        _integer("logit_bias", token_id, 0, MAX_TOKEN_ID): _number("logit_bias", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        for token_id, value in bias.items()
    }
    return checked or None


def _shown(value: object) -> str:
    """A value on one line, short enough for an error message."""
    try:
        text = repr(value)
    except ValueError:  # integers of thousands of digits refuse to print
        text = f"a {type(value).__name__} too long to print"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
