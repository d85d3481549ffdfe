"""The bodies of requests as pydantic models: the honoured fields of ``fields.TABLE`` with their types.

Types alone are checked here, strictly ("5" is no number). Ranges are SamplingParams' business, sizes those of ``limits``;
conversations are checked where they are rendered. Pydantic stays at this border: handlers turn a body into the runtime's own
options at once. The models of answers are documentation (OpenAPI): answers are written as plain dictionaries.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, JsonValue, model_validator
from pydantic.json_schema import JsonSchemaValue

from dmtd_runtime.server.fields import TABLE, Endpoint, honoured_fields

Json = dict[str, JsonValue]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class RequestBody(_Strict):
    """A body; fields that ``TABLE`` calls harmless are dropped, those it refuses are an error that names them."""

    endpoint: ClassVar[Endpoint]

    @property
    def scores_prompt(self) -> bool:
        """Whether the answer tells log probabilities of the prompt's own tokens."""
        return getattr(self, "prompt_logprobs", None) is not None

    @model_validator(mode="before")
    @classmethod
    def _by_the_table(cls, given: Any) -> Any:
        return honoured_fields(cls.endpoint, given) if isinstance(given, dict) else given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        inner = handler.resolve_ref_schema(schema)
        for name, row in TABLE[cls.endpoint].items():
            if row.use == "harmless":
                inner.setdefault("properties", {})[name] = {"description": "Accepted; changes nothing."}
        return schema


class Extension(_Strict):
    """What OpenAI's API has not: ``plain`` answers in plain mode, ``score_from`` scores tokens from there on in cycles,
    ``min_confidence`` ends a cycle where a late step is less sure.
    """

    plain: bool = False
    score_from: int | None = Field(default=None, ge=1)
    min_confidence: float | None = None


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputsBody(_Strict):
    """vLLM's: exactly one of them."""

    json_: Json | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: None = None


class JsonSchemaFormat(_Strict):
    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class SamplingBody(RequestBody):
    """What chats and completions share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int = Field(1, ge=1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int = 0
    cache_salt: str | None = Field(None, min_length=1)
    request_id: str | None = Field(None, min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")
    add_special_tokens: bool | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsBody | None = None
    dmtd: Extension = Extension()

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: got it without stream: true; leave it out")
        return self


class FunctionBody(_Strict):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ToolBody(_Strict):
    type: Literal["function"]
    function: FunctionBody


class NamedFunction(_Strict):
    name: str


class NamedTool(_Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatBody(SamplingBody):
    """Body of /v1/chat/completions."""

    endpoint = "chat"
    messages: list[Json] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    documents: list[Json] | None = None
    chat_template_kwargs: Json | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class CompletionBody(SamplingBody):
    """Body of /v1/completions."""

    endpoint = "completions"
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool = False

    @property
    def scores_prompt(self) -> bool:
        """``echo`` tells them beside the answer's."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)


class ResponsesReasoning(_Strict):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesText(_Strict):
    format: Json | None = None
    verbosity: str | None = None


class ResponsesBody(RequestBody):
    """Body of /v1/responses."""

    endpoint = "responses"
    input: str | list[Json]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stream: bool = False
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool = True
    text: ResponsesText | None = None
    reasoning: ResponsesReasoning | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    priority: int = 0
    cache_salt: str | None = Field(None, min_length=1)
    metadata: dict[str, str] | None = None
    user: str | None = None
    dmtd: Extension = Extension()


class TokenizeBody(RequestBody):
    """Body of /tokenize: a prompt, or messages."""

    endpoint = "tokenize"
    model: str | None = None
    prompt: str | None = None
    messages: list[Json] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    tools: list[Json] | None = None
    documents: list[Json] | None = None
    chat_template_kwargs: Json | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: expected either prompt or messages")
        return self


class DetokenizeBody(RequestBody):
    """Body of /detokenize."""

    endpoint = "detokenize"
    model: str | None = None
    tokens: list[int]


class _Told(BaseModel):
    """An answer: more may stand in it than is written here."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(_Told):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Told):
    error: ErrorDetail


class UsageAnswer(_Told):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StepsAnswer(_Told):
    """Steps behind the prompts, of all choices: ``dropped_tokens`` late steps were not kept (``min_confidence``).
    ``tokens_per_full_pass`` is null where there was no full pass.
    """

    full_passes: int
    late_steps: int
    dropped_tokens: int
    tokens_per_full_pass: float | None


class ChatMessage(_Told):
    role: Literal["assistant"]
    content: str | None


class ChatChoice(_Told):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(_Told):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    dmtd: StepsAnswer


class CompletionChoice(_Told):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(_Told):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer
    dmtd: StepsAnswer


class ResponsesAnswer(_Told):
    id: str
    object: Literal["response"]
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    dmtd: StepsAnswer


class ModelAnswer(_Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    context_length: int


class ModelsAnswer(_Told):
    object: Literal["list"]
    data: list[ModelAnswer]


class TokenizeAnswer(_Told):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(_Told):
    prompt: str


class TokenizerInfoAnswer(_Told):
    tokenizer_class: str
    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None
