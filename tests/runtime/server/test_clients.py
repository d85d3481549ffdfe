"""The clients that people have, against a running server: OpenAI's, LangChain's, LiteLLM's. Texts are those of ``LLM``."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from runtime_support import TinyBundle, make_bundle
from server_support import HERMES, HI, WEATHER, Running, chunks, running

from dmtd_models.reference import oracle
from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.server.options import ServerOptions

pytestmark = pytest.mark.timeout(300)

SEEDED: dict[str, Any] = {"temperature": 1.2, "seed": 11, "max_tokens": 12}


class Town(pydantic.BaseModel):
    name: Literal["Ulm", "Bonn"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("roomy"), max_positions=1024)  # tools take room


@pytest.fixture(scope="module")
def server(bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    template = tmp_path_factory.mktemp("template") / "hermes.jinja"
    template.write_text(HERMES)
    options = ServerOptions(
        served_model_name=["tiny", "other"], chat_template=template, allow_plain=True, reasoning_parser="think"
    )
    with running(bundle.directory, options) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm(bundle: TinyBundle) -> Iterator[LLM]:
    with LLM(bundle.directory, max_num_seqs=4, threads=1) as llm:
        yield llm


def prompt_of(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def texts(llm: LLM, prompt: str | list[int], *, n: int = 1, **options: Any) -> list[str]:
    [output] = llm.generate(prompt, SamplingParams(n=n, **options))
    return [each.text for each in output.outputs]


# Completions


def test_completions_are_those_of_llm(client: openai.OpenAI, llm: LLM) -> None:
    told = client.completions.create(model="tiny", prompt=["Hello", "You"], n=2, **SEEDED)
    expected = [*texts(llm, "Hello", n=2, **SEEDED), *texts(llm, "You", n=2, **SEEDED)]
    assert [choice.text for choice in told.choices] == expected
    assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
    outputs = [llm.generate(prompt, SamplingParams(n=2, **SEEDED))[0].outputs for prompt in ("Hello", "You")]
    count = sum(len(each.token_ids) for both in outputs for each in both)
    assert told.usage is not None and told.usage.completion_tokens == count
    streamed = [""] * 4
    for chunk in client.completions.create(model="tiny", prompt=["Hello", "You"], n=2, stream=True, **SEEDED):
        assert chunk.usage is None
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_several_greedy_choices_are_one_answer(client: openai.OpenAI, llm: LLM) -> None:
    told = client.completions.create(model="tiny", prompt=[5, 6, 7], n=3, temperature=0, max_tokens=5)
    assert [choice.text for choice in told.choices] == texts(llm, [5, 6, 7], temperature=0, max_tokens=5) * 3
    assert told.usage is not None and (told.usage.prompt_tokens, told.usage.completion_tokens) == (3, 15)


def test_text_under_load_is_the_text_alone(client: openai.OpenAI, llm: LLM) -> None:
    def ask(seed: int) -> str:
        options: dict[str, Any] = {**SEEDED, "seed": seed}
        return client.chat.completions.create(model="tiny", messages=HI, **options).choices[0].message.content or ""

    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(ask, range(24)))
    prompt = llm.tokenizer.encode(prompt_of("Hi"), add_special_tokens=False) if llm.tokenizer else []
    assert told == [texts(llm, prompt, **{**SEEDED, "seed": seed})[0] for seed in range(24)]


def test_log_probabilities_of_completions(client: openai.OpenAI, llm: LLM) -> None:
    ids = list(b"Hey you")
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "logprobs": 1}
    told = client.completions.create(model="tiny", prompt=ids, echo=True, **options).choices[0]
    [output] = llm.generate(ids, SamplingParams(temperature=0, max_tokens=3, logprobs=1, prompt_logprobs=1))
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is not None
    expected = [each and each.logprob for each in (*output.prompt_logprobs, *output.outputs[0].logprobs)]
    assert told.logprobs is not None and told.logprobs.token_logprobs == expected
    assert told.logprobs.top_logprobs is not None
    for each, top in zip(
        (*output.prompt_logprobs, *output.outputs[0].logprobs), told.logprobs.top_logprobs, strict=True
    ):
        if each is not None:  # harnesses ask whether the token was the likeliest
            assert max(top.values()) == each.top[0][1]
    alone = client.completions.create(model="tiny", prompt=ids, echo=True, **{**options, "max_tokens": 0}).choices[0]
    assert alone.logprobs is not None and alone.logprobs.token_logprobs == expected[: len(ids)]
    stream = client.completions.create(model="tiny", prompt=ids, echo=True, stream=True, **options)
    pieces = [chunk.choices[0] for chunk in stream]
    assert "".join(piece.text for piece in pieces) == told.text
    assert [p for piece in pieces if piece.logprobs for p in piece.logprobs.token_logprobs or []] == expected
    assert [
        o for piece in pieces if piece.logprobs for o in piece.logprobs.text_offset or []
    ] == told.logprobs.text_offset


def test_what_scores_measured_is_told(server: Running, llm: LLM) -> None:
    ids = list(b"Hey you there")
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1}
    as_prompt = server.post("/v1/completions", body).json()
    in_cycles = server.post("/v1/completions", {**body, "dmtd": {"score_from": 4}}).json()
    for told, expected in ((as_prompt, ("plain", None)), (in_cycles, ("cycles", 4))):
        assert (told["dmtd"]["prompt_logprobs"], told["dmtd"]["score_from"]) == expected
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    [output] = llm.generate(ids, params, score_from=4)
    assert output.prompt_logprobs is not None
    expected = [each and each.logprob for each in output.prompt_logprobs]
    assert in_cycles["choices"][0]["logprobs"]["token_logprobs"][: len(ids)] == expected
    assert as_prompt["choices"][0]["logprobs"]["token_logprobs"][: len(ids)] != expected


def test_a_wanted_confidence(server: Running, llm: LLM, bundle: TinyBundle) -> None:
    ids, body = [9, 8, 7], {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    want = oracle.adaptive(bundle.reference(4, ("prompt", "thinking")), ids, 12, 0.55)
    assert want.dropped and want.token_ids != tuple(bundle.greedy_tokens(ids, 12))
    told = server.post("/v1/completions", {**body, "prompt": ids, "dmtd": {"min_confidence": 0.55}}).json()
    assert tuple(told["choices"][0]["token_ids"]) == want.token_ids
    steps = {"full_passes": len(want.heads), "late_steps": want.late_steps, "dropped_tokens": want.dropped}
    assert told["dmtd"] == {**steps, "tokens_per_full_pass": 11 / len(want.heads)}
    refused = server.post("/v1/completions", {**body, "prompt": ids, "dmtd": {"min_confidence": 2}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "dmtd.min_confidence"


def test_plain_mode_is_the_plain_model(server: Running, bundle: TinyBundle) -> None:
    body = {"prompt": [9, 8, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    told = [server.post("/v1/completions", {**body, "dmtd": {"plain": plain}}).json() for plain in (True, False)]
    assert told[0]["choices"][0]["token_ids"] == bundle.greedy_tokens([9, 8, 7], 8, plain=True)
    assert told[1]["choices"][0]["token_ids"] == bundle.greedy_tokens([9, 8, 7], 8)


# Chats


def test_chats_whole_and_streamed(client: openai.OpenAI, llm: LLM) -> None:
    expected = llm.chat(HI, SamplingParams(**SEEDED))[0].outputs[0].text
    options: dict[str, Any] = {"model": "tiny", "messages": HI, **SEEDED, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason in ("stop", "length")
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot  # what it added up
    assert final.choices[0].message.content == expected and final.choices[0].message.role == "assistant"
    assert final.choices[0].logprobs == whole.choices[0].logprobs
    assert final.usage is not None and whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    raw = bytes(byte for each in whole.choices[0].logprobs.content for byte in each.bytes or [])
    assert raw.decode(errors="replace").startswith(expected[:4])


def test_an_async_client_streams(server: Running, llm: LLM) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            stream = await client.chat.completions.create(model="other", messages=HI, stream=True, **SEEDED)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == llm.chat(HI, SamplingParams(**SEEDED))[0].outputs[0].text


def test_the_shape_of_a_stream(server: Running) -> None:
    body = {"messages": HI, "max_tokens": 5, "temperature": 0, "stream": True, "n": 2}
    told = chunks(server.post("/v1/chat/completions", body))
    assert told[-1] == "[DONE]" and all("usage" not in chunk for chunk in told[:-1])
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in told[:-1] if chunk["choices"][0]["index"] == index]
        assert [choice["delta"].get("role") for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == "length"
    body["stream_options"] = {"include_usage": True}
    told = chunks(server.post("/v1/chat/completions", body))
    assert told[-2]["choices"] == [] and told[-2]["usage"]["completion_tokens"] == 10
    assert told[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
    whole = server.post("/v1/chat/completions", {**body, "stream": False, "stream_options": None}).json()
    assert told[-2]["dmtd"] == whole["dmtd"] and whole["dmtd"]["full_passes"] > 0
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    assert all("usage" in chunk for chunk in chunks(server.post("/v1/chat/completions", body))[:-1])


def test_roles_and_parts(server: Running, bundle: TinyBundle) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "Hi", "name": "Ann", "type": "message", "tool_call_id": None},
        {"role": "assistant", "content": "Yes", "tool_calls": [], "refusal": None, "function_call": None},
        {"role": "tool", "content": "3", "tool_call_id": "x"},
    ]
    told = server.post("/tokenize", {"messages": messages}).json()
    text = server.post("/detokenize", {"tokens": told["tokens"]}).json()["prompt"]
    said = (("system", "Be\nkind"), ("user", "Hi"), ("assistant", "Yes"), ("tool", "3"))
    expected = (
        "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said) + "<|im_start|>assistant\n"
    )
    assert text == expected and told["count"] == len(told["tokens"]) and told["max_model_len"] == 1024
    more = {"messages": messages[:3], "add_generation_prompt": False, "continue_final_message": True}
    told = server.post("/tokenize", more).json()
    text = server.post("/detokenize", {"tokens": told["tokens"]}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\nYes")


def test_tools(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": HI,
        "tools": [WEATHER],
        "max_tokens": 200,
        "temperature": 1.5,
    }
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        told = client.chat.completions.create(**options, seed=3, tool_choice=choice, parallel_tool_calls=False).choices[
            0
        ]
        assert told.finish_reason == "tool_calls" and told.message.content is None
        [call] = told.message.tool_calls or []
        assert call.type == "function" and call.function.name == "weather" and call.id
        assert json.loads(call.function.arguments)["town"] in ("Ulm", "Bonn")
        with client.chat.completions.stream(**options, seed=3, tool_choice=choice, parallel_tool_calls=False) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        [streamed] = final.message.tool_calls or []
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)


def test_calls_and_thoughts_in_what_the_model_wrote(server: Running) -> None:
    one = '<tool_call>{"name": "weather", "arguments": {"town": "Ulm"}}</tool_call>'
    said = f"So be it\n{one}\n{one}"
    body: dict[str, Any] = {
        "messages": HI,
        "tools": [WEATHER],
        "max_tokens": 220,
        "structured_outputs": {"choice": [said]},
    }
    message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["content"] == "So be it" and len(message["tool_calls"]) == 2
    assert {call["function"]["arguments"] for call in message["tool_calls"]} == {'{"town": "Ulm"}'}
    deltas = [
        c["choices"][0]["delta"] for c in chunks(server.post("/v1/chat/completions", {**body, "stream": True}))[:-1]
    ]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls if "id" in call] == [0, 1]
    assert all(isinstance(call["index"], int) for call in calls)
    assert len({call["id"] for call in calls if "id" in call}) == 2
    alone = server.post("/v1/chat/completions", {**body, "parallel_tool_calls": False}).json()["choices"][0]["message"]
    assert len(alone["tool_calls"]) == 1
    quiet = server.post("/v1/chat/completions", {**body, "tool_choice": "none"}).json()["choices"][0]["message"]
    assert quiet["content"] == said and "tool_calls" not in quiet


def test_answers_of_a_form(client: openai.OpenAI, server: Running) -> None:
    told = client.chat.completions.parse(
        model="tiny", messages=HI, response_format=Town, max_tokens=120, temperature=1.5
    )
    assert isinstance(told.choices[0].message.parsed, Town)
    body: dict[str, Any] = {"messages": HI, "max_tokens": 60, "temperature": 1.5}
    for form, right in (
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": "[a-c]{3}"}, lambda text: len(text) == 3 and set(text) <= set("abc")),
        ({"grammar": 'start: "x" | "y"'}, lambda text: text in ("x", "y")),
    ):
        for path, more in (("/v1/chat/completions", {}), ("/v1/completions", {"prompt": "Hi"})):
            asked = {**({"max_tokens": 60} | more if more else body), "structured_outputs": form}
            choice = server.post(path, asked).json()["choices"][0]
            assert right(choice["message"]["content"] if "message" in choice else choice["text"])
    for field, bad in (
        ("structured_outputs", {"regex": "("}),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}),
        ("response_format", {"type": "json_schema"}),
    ):
        answer = server.post("/v1/chat/completions", {**body, field: bad})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


# Responses


def test_responses(client: openai.OpenAI, llm: LLM) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": "Hi", "temperature": 0, "max_output_tokens": 10}
    expected = llm.chat(HI, SamplingParams(temperature=0, max_tokens=10))[0].outputs[0].text
    whole = client.responses.create(**options)
    assert whole.output_text == expected and whole.status == "incomplete"
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    deltas = [
        event for event in client.responses.create(**options, stream=True) if event.type == "response.output_text.delta"
    ]
    assert "".join(event.delta for event in deltas) == expected
    parsed = client.responses.parse(model="tiny", input="Hi", text_format=Town, max_output_tokens=120)
    assert isinstance(parsed.output_parsed, Town)


def test_responses_call_functions(client: openai.OpenAI) -> None:
    tool: dict[str, Any] = {"type": "function", "strict": True, **WEATHER["function"]}  # type: ignore[dict-item]
    options: dict[str, Any] = {"model": "tiny", "tools": [tool, {"type": "web_search"}], "max_output_tokens": 200}
    told = client.responses.create(input="Hi", tool_choice="required", parallel_tool_calls=False, **options)
    [call] = told.output
    assert call.type == "function_call" and json.loads(call.arguments)["town"] in ("Ulm", "Bonn")
    history: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    again = client.responses.create(input=history, tool_choice="none", **{**options, "max_output_tokens": 4})
    assert again.output_text
    with client.responses.stream(input="Hi", tool_choice="required", parallel_tool_calls=False, **options) as stream:
        final = stream.get_final_response()
    assert final.output[0].type == "function_call" and json.loads(final.output[0].arguments)


# Others' clients


def test_langchain(server: Running, llm: LLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_openai import ChatOpenAI

        model = ChatOpenAI(model="tiny", base_url=server.url, api_key="none", temperature=0, max_tokens=10)  # type: ignore[call-arg, arg-type]
        expected = llm.chat(HI, SamplingParams(temperature=0, max_tokens=10))[0].outputs[0].text
        assert model.invoke("Hi").content == expected
        assert "".join(str(chunk.content) for chunk in model.stream("Hi")) == expected
        roomy = ChatOpenAI(model="tiny", base_url=server.url, api_key="none", max_tokens=150)  # type: ignore[call-arg, arg-type]
        town = roomy.with_structured_output(Town).invoke("Hi")
        assert isinstance(town, Town)
        bound = roomy.bind_tools([WEATHER], tool_choice="weather")
        assert bound.invoke("Hi").tool_calls[0]["name"] == "weather"


def test_litellm(server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import litellm

        options: dict[str, Any] = {"model": "openai/tiny", "api_base": server.url, "api_key": "none", "messages": HI}
        options |= {"temperature": 0, "max_tokens": 10}
        expected = llm.chat(HI, SamplingParams(temperature=0, max_tokens=10))[0].outputs[0].text
        assert litellm.completion(**options).choices[0].message.content == expected
        pieces = litellm.completion(**options, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected


def test_what_it_says_of_itself(client: openai.OpenAI, server: Running, bundle: TinyBundle) -> None:
    models = {model.id: model.to_dict() for model in client.models.list()}
    assert set(models) == {"tiny", "other"} and client.models.retrieve("tiny").id == "tiny"
    assert models["tiny"]["max_model_len"] == models["tiny"]["context_length"] == 1024
    info = server.get("/tokenizer_info").json()
    assert info["chat_template"] == HERMES
    config = json.loads(Path(bundle.directory, "tokenizer_config.json").read_text())
    assert info["eos_token"] == config["eos_token"]
    told = server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}).json()
    assert told["token_strs"] == ["H", "i"] and server.post("/detokenize", {"tokens": told["tokens"]}).json() == {
        "prompt": "Hi"
    }
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="Hi")
    assert caught.value.code == "model_not_found"
