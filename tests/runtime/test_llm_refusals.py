"""What LLM refuses: one line that names the argument, before anything has started."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from runtime_support import ENDLESS, GREEDY, TinyBundle

from dmtd_runtime import LLM, RequestError, SamplingParams

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "empty list"),
        ("", "no tokens"),
        ([[]], "no tokens"),
        ([[1], []], "no tokens"),
        ([259], "got token id 259, expected integers from 0 to 258"),
        ([-1, 1], "got token id -1"),
        ([[1, "a"]], "got token id 'a'"),
        ([[1.5]], "got token id 1.5"),
        ([[True, False]], "got token id True"),
    ],
)
def test_prompts_that_cannot_be_served(llm: LLM, prompts, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        llm.generate(prompts, GREEDY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [None, 3, b"ab", [1.5], [[1], None], [True], {"a": 1}])
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=2))


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True])
def test_timeouts_that_make_no_sense(llm: LLM, timeout: float) -> None:
    with pytest.raises(RequestError, match="timeout_s"):
        llm.generate([1], GREEDY, timeout_s=timeout)


@pytest.mark.parametrize(
    "option",
    [
        {"params": {"temperature": 0}},
        {"timeout_s": "a"},
        {"timeout_s": -1},
        {"priority": None},
        {"priority": 0.5},
        {"priority": True},
        {"cache_salt": ""},
        {"cache_salt": 7},
    ],
)
def test_options_of_the_wrong_kind_are_refused(llm: LLM, option: Any) -> None:
    [name] = option
    with pytest.raises(RequestError, match="expected") as caught:
        llm.generate([1, 2], **option)
    assert caught.value.param == name


@pytest.mark.parametrize("request_id", ["", 7])
def test_names_that_are_none_are_refused(llm: LLM, request_id: Any) -> None:
    with pytest.raises(RequestError, match="request_id: got"):
        llm.stream([1, 2], request_id=request_id)


def test_a_stream_whose_request_id_is_in_use(llm: LLM) -> None:
    with llm.stream([1], ENDLESS, request_id="twice") as first:
        with pytest.raises(RequestError, match="'twice' is in use"):
            llm.stream([1], GREEDY, request_id="twice")
        next(first)  # the refusal did not end the first one
    assert list(llm.stream([1], GREEDY, request_id="twice"))[-1].finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": 9},
        {"max_model_len": 0},
        {"threads": 0},
        {"max_num_queued_reqs": 0},
        {"prefix_cache_bytes": -1},
    ],
)
def test_options_out_of_range(bundle: TinyBundle, options: dict[str, int]) -> None:
    before = threading.active_count()
    with pytest.raises(RequestError, match="expected"):
        LLM(bundle.directory, **options)
    assert threading.active_count() == before


@pytest.mark.parametrize("option", [{"device": "gpu"}, {"full_pass": "foo"}, {"dialect": "tensorrt"}])
def test_an_unknown_device_mode_or_dialect_is_refused(bundle: TinyBundle, option: Any) -> None:
    with pytest.raises(RequestError, match="expected one of"):
        LLM(bundle.directory, **option)
