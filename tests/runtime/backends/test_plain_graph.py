"""Plain decoding of one sequence in a graph of its own: the oracle's tokens, and no pass behind the end of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from runtime_support import TinyBundle, TinyBundles, random_prompt, sequence_of, tokens_of

from dmtd_models.reference import oracle
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.cycle import CyclePlan
from dmtd_runtime.llm import LLM
from dmtd_runtime.sampling.params import SamplingParams
from dmtd_runtime.serving.loop import Loop
from dmtd_runtime.serving.options import ServingOptions
from dmtd_runtime.serving.prefix_cache import BLOCK_ROWS
from dmtd_runtime.serving.sequence import TokenEvent

GREEDY = SamplingParams(temperature=0, max_tokens=19)
PLAIN = BackendOptions(threads=1, plain=True)


@pytest.fixture(params=[0, 2], ids=["E0", "E2"])
def bundle(tiny: TinyBundles, request: pytest.FixtureRequest) -> TinyBundle:
    return tiny.get("qwen3", request.param)


@pytest.fixture
def backend(bundle: TinyBundle) -> Iterator[OnnxRuntimeBackend]:
    opened = OnnxRuntimeBackend(bundle.directory, bundle.manifest, PLAIN)
    yield opened
    opened.close()


def plain_plan(bundle: TinyBundle) -> CyclePlan:
    return CyclePlan(cycle=bundle.manifest.cycle, plain=True)


def plain_tokens(bundle: TinyBundle, prompt: list[int], count: int = 19) -> list[int]:
    cycle = bundle.manifest.cycle
    reference = bundle.reference(cycle.cycle_length, (cycle.cycle_origin, cycle.prompt_input))
    return list(oracle.greedy(reference, prompt, count, True).token_ids)


def test_its_tokens_are_the_oracles_whoever_chooses_them(bundle: TinyBundle, backend: OnnxRuntimeBackend) -> None:
    prompt = random_prompt(0, 6)
    want = plain_tokens(bundle, prompt)
    assert list(backend._sessions) == ["full_pass"]
    with_logits = SamplingParams(temperature=0, logprobs=1, max_tokens=19)  # step by step
    for params in (GREEDY, with_logits):
        assert tokens_of(backend, plain_plan(bundle), [prompt], [params]) == [want]


def test_no_pass_is_run_behind_the_end(bundle: TinyBundle, backend: OnnxRuntimeBackend) -> None:
    prompt = random_prompt(0, 6)
    want = plain_tokens(bundle, prompt)
    for end in range(10):
        length = 1 + want.index(want[end])
        before = backend.stats.full_passes
        params = SamplingParams(temperature=0, max_tokens=19, stop_token_ids=(want[end],))
        assert tokens_of(backend, plain_plan(bundle), [prompt], [params]) == [want[:length]]
        assert backend.stats.full_passes - before == length  # the prompt's, and one for each token but the last


def test_what_is_kept_of_an_ended_sequence_is_what_was_run(bundle: TinyBundle, backend: OnnxRuntimeBackend) -> None:
    """A cycle that is left early has no row of its last token, which may complete a block of what is kept."""
    loop = Loop(backend, plain_plan(bundle), options=ServingOptions(prefix_cache_bytes=1 << 24))
    for length in range(BLOCK_ROWS - 8, BLOCK_ROWS):
        prompt, told = random_prompt(length, length), list[TokenEvent]()
        want = plain_tokens(bundle, prompt, BLOCK_ROWS + 1)
        stop = want[BLOCK_ROWS - length - 1]  # its row would be a block's last
        params = SamplingParams(temperature=0, max_tokens=BLOCK_ROWS + 1, stop_token_ids=(stop,))
        first = sequence_of(prompt, params, told)
        loop.add(first)
        while loop.sequences:
            loop.step()
        second = sequence_of([*first.ids, 5], GREEDY, told)
        loop.add(second)
        while loop.sequences:
            loop.step()
        assert second.ids[len(first.ids) + 1 :] == plain_tokens(bundle, [*first.ids, 5])


@pytest.mark.parametrize(
    ("how", "sessions"),
    [
        ({}, ["cycle"]),
        ({"full_pass": "fused"}, ["full_pass"]),
        ({"full_pass": "staged"}, ["thinking", "late_decode"]),
        ({"full_pass": "fused", "dialect": "standard"}, ["full_pass"]),
    ],
)
def test_several_sequences(bundle: TinyBundle, how: dict[str, Any], sessions: list[str]) -> None:
    options = BackendOptions(threads=1, plain=True, max_num_seqs=3, **how)
    backend = OnnxRuntimeBackend(bundle.directory, bundle.manifest, options)
    prompts = [random_prompt(seed, 5 + seed) for seed in range(3)]
    assert list(backend._sessions) == sessions
    assert tokens_of(backend, plain_plan(bundle), prompts, [GREEDY] * 3) == [
        plain_tokens(bundle, prompt) for prompt in prompts
    ]
    backend.close()


def test_plain_is_an_option_of_the_product(bundle: TinyBundle) -> None:
    prompt = random_prompt(0, 6)
    with LLM(bundle.directory, threads=1, plain=True) as llm:
        [answer] = llm.generate([prompt], GREEDY)
        assert list(answer.outputs[0].token_ids) == plain_tokens(bundle, prompt)
        assert llm.stats.late_steps == 0
