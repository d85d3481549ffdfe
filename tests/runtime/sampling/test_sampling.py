"""SamplingParams: defaults, every limit from both sides, contradictions, generation_config.json."""

import copy
import math
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmtd_runtime.errors import BundleError, RequestError
from dmtd_runtime.sampling.params import SamplingParams


def test_defaults_are_those_people_expect() -> None:
    assert asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": None,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "logit_bias": None,
        "structured_outputs": None,
        "min_confidence": 0.0,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
    }


ACCEPTED: list[dict[str, Any]] = [
    {"n": 128},
    {"temperature": 0},
    {"temperature": 100},
    {"top_p": 1e-9},
    {"top_k": -1},
    {"top_k": 151936},
    {"min_p": 1},
    {"min_confidence": 1},
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"repetition_penalty": 0.5},
    {"seed": -1},
    {"seed": 2**64 - 1},
    {"stop": "x" * 1024},
    {"stop": ["a"] * 64},
    {"stop": None},
    {"stop_token_ids": [0, 5]},
    {"min_tokens": 4, "max_tokens": 4},
    {"logprobs": 0},
    {"logprobs": 20},
    {"logit_bias": {0: -100, 7: 100.0}},
    {"n": np.int64(2), "temperature": np.float32(0.5)},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_accepted(options: dict[str, Any]) -> None:
    SamplingParams(**options)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n: got 0, expected 1 to 128"),
    ({"n": 129}, "n: got 129, expected 1 to 128"),
    ({"n": True}, "n: got True, expected a whole number"),
    ({"n": 1.0}, "n: got 1.0, expected a whole number"),
    ({"temperature": -0.1}, "temperature: got -0.1, expected a finite number from 0 to 100"),
    ({"temperature": math.nan}, "temperature: got nan"),
    ({"temperature": math.inf}, "temperature: got inf"),
    ({"temperature": "0.7"}, "temperature: got '0.7'"),
    ({"temperature": False}, "temperature: got False"),
    ({"temperature": 10**400}, "temperature: got 1000"),
    ({"top_p": 0}, "top_p: got 0, expected a finite number above 0 up to 1"),
    ({"top_p": 1.01}, "top_p: got 1.01"),
    ({"top_k": -2}, "top_k: got -2, expected -1 to"),
    ({"min_p": -0.5}, "min_p: got -0.5"),
    ({"min_p": 1.5}, "min_p: got 1.5"),
    ({"min_confidence": -0.1}, "min_confidence: got -0.1, expected a finite number from 0 to 1"),
    ({"min_confidence": 50}, "min_confidence: got 50"),
    ({"presence_penalty": 2.1}, "presence_penalty: got 2.1, expected a finite number from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty: got -3"),
    ({"repetition_penalty": 0}, "repetition_penalty: got 0, expected a finite number above 0"),
    ({"seed": 2**64}, "seed: got 18446744073709551616"),
    ({"seed": 10**6000}, "seed: got a int too long to print"),
    ({"stop": ""}, "stop: got an empty string, expected at least one character"),
    ({"stop": "x" * 1025}, "stop: got a string of 1025 characters"),
    ({"stop": ["a"] * 65}, "stop: got 65 strings, expected at most 64"),
    ({"stop": [3]}, "stop: got 3, expected a string or a list of strings"),
    ({"stop": b"a"}, "stop: got b'a'"),
    ({"stop_token_ids": [-1]}, "stop_token_ids: got -1"),
    ({"stop_token_ids": "2"}, "stop_token_ids: got '2', expected a list"),
    ({"stop_token_ids": list(range(1025))}, "stop_token_ids: got 1025 ids"),
    ({"ignore_eos": 1}, "ignore_eos: got 1, expected true or false"),
    ({"max_tokens": 0}, "max_tokens: got 0"),
    ({"min_tokens": -1}, "min_tokens: got -1"),
    ({"logprobs": 21}, "logprobs: got 21, expected 0 to 20"),
    ({"logit_bias": {1: 101}}, "logit_bias: got 101"),
    ({"logit_bias": {1: math.nan}}, "logit_bias: got nan"),
    ({"logit_bias": {"1": 1}}, "logit_bias: got '1'"),
    ({"logit_bias": {-1: 1}}, "logit_bias: got -1"),
    ({"logit_bias": [1]}, "logit_bias: got [1], expected a mapping"),
    ({"logit_bias": dict.fromkeys(range(1025), 0)}, "logit_bias: got 1025 entries, expected at most 1024"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: got 5 with max_tokens 4"),
    ({"temperature": 0, "n": 2}, "n: got 2 with temperature 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_with_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_is_frozen_and_owns_its_values() -> None:
    bias = {3: 1}
    stop = ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop, stop_token_ids=[1])
    bias[4] = 2
    stop.append("b")
    assert params.logit_bias == {3: 1.0}
    assert params.stop == ("a",)
    assert params.stop_strings == ("a",)
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert copy.deepcopy(params) == params
    assert isinstance(hash(params), int)
    assert replace(params, stop="END").stop_strings == ("END",)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (1.0, False)])
def test_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_validate_for_a_vocabulary() -> None:
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1}).validate_for(10)
    with pytest.raises(RequestError, match=r"stop_token_ids: got token id 10, expected ids from 0 to 9"):
        SamplingParams(stop_token_ids=[10]).validate_for(10)
    with pytest.raises(RequestError, match=r"logit_bias: got token id 10, expected ids from 0 to 9"):
        SamplingParams(logit_bias={10: 1}).validate_for(10)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 0.7}, {"temperature": 0.0}),
        (
            # The options that Qwen3 ships.
            {
                "bos_token_id": 151643,
                "do_sample": True,
                "eos_token_id": [151645, 151643],
                "pad_token_id": 151643,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "transformers_version": "4.51.0",
            },
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "top_k": None, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 32},
            {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.1, "max_tokens": 32},
        ),
        ({"do_sample": True, "top_k": 50.0}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": False, "top_p": 0.0, "top_k": 20}, {"temperature": 0.0, "top_k": 20}),
        ({"top_p": 0.9, "top_k": -5, "min_p": "x"}, {"temperature": 0.0, "top_p": 0.9}),
        ({"min_new_tokens": 40, "max_new_tokens": 8.0}, {"temperature": 0.0, "min_tokens": 8, "max_tokens": 8}),
        ({"min_new_tokens": 40}, {"temperature": 0.0, "min_tokens": 40}),
        ({"min_confidence": 0.4}, {"temperature": 0.0, "min_confidence": 0.4}),
    ],
)
def test_from_generation_config(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    assert asdict(SamplingParams.from_generation_config(raw)) == {**asdict(SamplingParams()), **expected}


def test_from_generation_config_names_the_file() -> None:
    for raw, found in (
        ({"top_p": 7, "do_sample": True}, "top_p: got 7"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"),
        ({"min_new_tokens": -1}, "min_tokens: got -1"),
        ({"top_k": 50.5, "do_sample": True}, "top_k: got 50.5"),
    ):
        with pytest.raises(BundleError, match=rf"generation_config\.json: {found}"):
            SamplingParams.from_generation_config(raw)


def test_values_that_nobody_reads_are_told() -> None:
    lines: list[str] = []
    SamplingParams.from_generation_config({"top_p": 0.0, "top_k": 50}, ignored=lines.append)
    [line] = lines
    assert line.startswith("generation_config.json: top_p: got 0, expected a finite number above 0 up to 1; ignored")


ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a\n\x00", max_size=3) | st.lists(st.integers())
)


@settings(deadline=None)
@given(options=st.dictionaries(st.sampled_from(sorted(asdict(SamplingParams()))), ANYTHING))
def test_any_value_is_taken_or_refused_by_name(options: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**options)
    except RequestError as error:
        refused = str(error)
    else:
        assert SamplingParams(**asdict(params)) == params
        return
    assert refused.split(":")[0].split(" ")[0] in {*options, "n", "min_tokens"}
