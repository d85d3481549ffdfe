"""The options that generate and chat share, and how they become ``SamplingParams`` and an open ``LLM``.

An option that is not given keeps the value of the bundle's generation_config.json, then that of ``SamplingParams``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmtd_runtime.cli.common import logs_to_stderr, note
from dmtd_runtime.errors import RequestError

if TYPE_CHECKING:
    from dmtd_runtime.backends.base import BackendOptions
    from dmtd_runtime.llm import LLM
    from dmtd_runtime.sampling.params import SamplingParams

UNTRAINED = "note: weights not trained for DMTD: the speed is real, the words are not (compare with --plain)"
_PANEL = "Sampling (by default as the bundle's generation_config.json says)"


def _sampling(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_PANEL, show_default=False)


TemperatureOption = Annotated[float | None, _sampling("0 takes the most likely token.")]
GreedyOption = Annotated[bool, _sampling("The most likely token, always: --temperature 0.", "--greedy")]
TopPOption = Annotated[float | None, _sampling("Fewest tokens whose probabilities reach this sum.")]
TopKOption = Annotated[int | None, _sampling("This many most likely tokens; 0 is off.")]
MinPOption = Annotated[float | None, _sampling("Tokens at least this share as likely as the best.")]
PresenceOption = Annotated[float | None, _sampling("Subtracted from tokens already generated.")]
FrequencyOption = Annotated[float | None, _sampling("Subtracted once for every time.")]
RepetitionOption = Annotated[float | None, _sampling("Above 1: repeats become less likely.")]
SeedOption = Annotated[int | None, _sampling("The same seed gives the same tokens.")]
MaxTokensOption = Annotated[int | None, _sampling("Most new tokens; by default until the end of the sequence.")]
MinTokensOption = Annotated[int | None, _sampling("No end of sequence before this many tokens.")]
StopOption = Annotated[list[str] | None, _sampling("A string that ends the text; may be given again.", "--stop")]
StopIdsOption = Annotated[str | None, _sampling("Token ids that end the sequence: 1,2,3.", "--stop-token-ids")]
IgnoreEosOption = Annotated[bool, _sampling("Go on after an end-of-sequence token.", "--ignore-eos")]
LogitBiasOption = Annotated[str | None, _sampling('JSON object, token id to number: {"50": -100}.', "--logit-bias")]


def sampling_params(
    defaults: SamplingParams, *, greedy: bool = False, temperature: float | None = None, given: dict[str, Any]
) -> SamplingParams:
    """``defaults`` with what was given on the command line; None (or False, or nothing) means not given.

    Raises:
        RequestError: values out of range, or two that contradict each other.
    """
    if greedy and temperature:
        raise RequestError(f"got {temperature:g} with --greedy, which is 0; give one of them", param="temperature")
    changes = {name: value for name, value in given.items() if value is not None and value is not False}
    if greedy or temperature is not None:
        changes["temperature"] = 0.0 if greedy else temperature
    params = replace(defaults, **changes)
    idle = [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "min_p", "seed") if name in changes]
    if params.greedy and idle:
        note(f"note: {', '.join(idle)} changes nothing at temperature 0; add --temperature 0.7, say")
    return params


def parse_ids(text: str | None, param: str) -> list[int] | None:
    """Token ids written with commas or spaces."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise RequestError(f"got {text[:60]!r}, expected whole numbers such as 1,2,3", param=param) from None


def parse_logit_bias(text: str | None) -> dict[int, float] | None:
    """A JSON object of token ids and numbers."""
    if text is None:
        return None
    try:
        raw = json.loads(text)
        return {int(token_id): value for token_id, value in raw.items()}
    except (ValueError, AttributeError):
        raise RequestError(f'got {text[:60]!r}, expected JSON such as {{"50": -100}}', param="logit_bias") from None


@contextlib.contextmanager
def open_llm(bundle: Path, options: BackendOptions, *, plain: bool, max_num_seqs: int | None = None) -> Iterator[LLM]:
    """The bundle, open; says on stderr if its weights were not trained for DMTD."""
    from dmtd_runtime.llm import LLM

    with (
        logs_to_stderr(without="not trained for DMTD"),
        LLM(
            bundle,
            backend=options.backend,
            cuda_graphs=options.cuda_graphs,
            warm_up=options.warm_up,
            device=options.device,
            device_id=options.device_id,
            dialect=options.dialect,
            full_pass=options.full_pass,
            max_num_seqs=max_num_seqs,
            max_model_len=options.max_model_len,
            threads=options.threads,
            plain=plain,
        ) as llm,
    ):
        if not llm.manifest.cycle.dmtd_trained and not plain:
            note(UNTRAINED)
        yield llm
