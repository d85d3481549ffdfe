"""Every field that a request may carry, in one table: honoured, harmless, or refused by name.

Nothing that changes what is answered is ever ignored. An honoured field is one of the models in ``schema.py`` (a test holds the
two together); a harmless one is accepted and dropped; a refused one is 400 with its name, unless it is null or says no more
than what happens anyway; whatever stands nowhere here is 400 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Endpoint = Literal["chat", "completions", "responses", "tokenize", "detokenize"]
Use = Literal["honoured", "harmless", "refused"]


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of a field. ``neutral``: values that ask for nothing; ``why`` of a refusal ends "NAME: ..."."""

    use: Use
    why: str = ""
    neutral: tuple[Any, ...] = ()


class RefusedField(ValueError):  # noqa: N818 - not an error of ours to catch by name: pydantic wraps it
    """A field that stands under ``refused``, or nowhere."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name


def _honoured(names: str) -> dict[str, Row]:
    return {name: Row("honoured") for name in names.split()}


def _harmless(names: str) -> dict[str, Row]:
    return {name: Row("harmless") for name in names.split()}


def _refused(why: str, *neutral: Any, names: str) -> dict[str, Row]:
    return {name: Row("refused", why, neutral) for name in names.split()}


_NOT_OURS = "this server does not do that; leave it out"
_OLD_GUIDED = "is called structured_outputs now: {json, regex, choice, grammar}"

_SAMPLING = (
    _honoured("model stream stream_options temperature top_p top_k min_p presence_penalty frequency_penalty")
    | _honoured("repetition_penalty seed n stop stop_token_ids ignore_eos min_tokens max_tokens logit_bias logprobs")
    | _honoured("skip_special_tokens include_stop_str_in_output priority cache_salt structured_outputs response_format")
    | _honoured("return_token_ids return_tokens_as_token_ids prompt_logprobs add_special_tokens request_id dmtd")
    | _harmless("user metadata store safety_identifier prompt_cache_key prompt_cache_retention service_tier")
    | _refused(_OLD_GUIDED, names="guided_json guided_regex guided_choice guided_grammar guided_decoding_backend")
    | _refused(_OLD_GUIDED, names="guided_whitespace_pattern guided_json_object")
    | _refused("sequences are sampled, not searched; leave it out", False, names="use_beam_search early_stopping")
    | _refused("belongs to beam search, which is not here; leave it out", 1, names="length_penalty")
    | _refused(_NOT_OURS, (), {}, names="logits_processors kv_transfer_params vllm_xargs mm_processor_kwargs")
    | _refused(_NOT_OURS, (), names="bad_words allowed_token_ids structural_tag repetition_detection")
    | _refused("shorten the prompt before it is sent", names="truncate_prompt_tokens truncation_side")
    | _refused("a token's blanks are as its text has them; leave it out", True, names="spaces_between_special_tokens")
    | _refused("this server has no model of rewards; leave it out", names="moderation")
)

_CHAT = (
    _SAMPLING
    | _honoured("messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls reasoning_effort")
    | _honoured("documents chat_template_kwargs add_generation_prompt continue_final_message include_reasoning")
    | _harmless("verbosity prompt_cache_options")
    | _refused("this model reads and writes text alone", names="audio")
    | _refused("this model reads and writes text alone", ["text"], names="modalities")
    | _refused("guesses of the answer are not used; leave it out", names="prediction")
    | _refused("this server searches nothing; leave it out", names="web_search_options")
    | _refused("is called tools now", (), names="functions")
    | _refused("is called tool_choice now", names="function_call")
    | _refused("templates come from the bundle or --chat-template, never from a request", names="chat_template")
    | _refused("is for /v1/completions; send continue_final_message to go on with a message", False, names="echo")
    | _refused(_NOT_OURS, names="thinking_token_budget media_io_kwargs")
)

_COMPLETIONS = (
    _SAMPLING
    | _honoured("prompt best_of echo")
    | _refused("the model continues a prompt, it fills no gap; leave it out", "", names="suffix")
    | _refused(_NOT_OURS, names="prompt_embeds")
)

_RESPONSES = (
    _honoured(
        "model input instructions max_output_tokens temperature top_p top_k min_p presence_penalty frequency_penalty"
    )
    | _honoured(
        "repetition_penalty seed stream tools tool_choice parallel_tool_calls text reasoning top_logprobs include"
    )
    | _honoured("priority cache_salt metadata user dmtd")
    | _harmless("store max_tool_calls")
    | _refused("nothing is kept between requests: send the whole input", names="previous_response_id")
    | _refused("inputs are not cut; shorten it", "disabled", names="truncation")
    | _harmless(
        "safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options service_tier stream_options"
    )
    | _harmless("client_metadata")
    | _refused("answers come at once or as a stream; leave it out", False, names="background")
    | _refused("nothing is kept between requests: send the whole input", names="conversation prompt")
    | _refused(_NOT_OURS, names="context_management moderation multi_agent background_options access_programs image")
    | _refused(_NOT_OURS, "disabled", names="prompt_cache_breakpoint")
)

_TOKENIZE = (
    _honoured("model prompt messages add_special_tokens add_generation_prompt continue_final_message return_token_strs")
    | _honoured("tools documents chat_template_kwargs")
    | _refused("templates come from the bundle or --chat-template, never from a request", names="chat_template")
    | _refused(_NOT_OURS, {}, names="mm_processor_kwargs media_io_kwargs")
)

TABLE: Mapping[Endpoint, Mapping[str, Row]] = {
    "chat": _CHAT,
    "completions": _COMPLETIONS,
    "responses": _RESPONSES,
    "tokenize": _TOKENIZE,
    "detokenize": _honoured("model tokens"),
}


def honoured_fields(endpoint: Endpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says, without nulls and without what is harmless.

    Raises:
        RefusedField: for the first field that is refused or unknown.
    """
    table = TABLE[endpoint]
    kept = {}
    for name, value in given.items():
        row = table.get(name)
        if row is None:
            raise RefusedField(shown_name(name), "this server knows no such field; leave it out")
        if row.use == "refused" and value is not None and not _is_neutral(value, row.neutral):
            raise RefusedField(name, row.why)
        if row.use == "honoured" and value is not None:
            kept[name] = value
    return kept


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of these; ``()`` stands for an empty list, and True is not 1."""
    shown = () if value == [] and isinstance(value, list) else value
    return any(shown == each and isinstance(shown, bool) == isinstance(each, bool) for each in neutral)


def shown_name(name: str) -> str:
    """A key of a client's as an error tells it."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(name))
    return text if len(text) <= 60 else text[:57] + "..."
