"""Requests over quantised weights: in company, behind a kept prefix and alone they say the same, but for near ties."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from runtime_support import random_prompt

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.serving.outputs import RequestOutput

PREFIX = random_prompt(7, 40, 128)
PROMPTS = [[*PREFIX, *random_prompt(seed, length, 128)] for seed, length in ((1, 1), (2, 9), (3, 17), (4, 30))]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
# A step of int8 more or less in an input; kernels of some processors sum in another order beside other rows.
CLOSE = 0.1


@pytest.fixture(scope="module", params=[("int4", 32), ("int4-symmetric", 32), ("int8", 32)], ids=lambda param: param[0])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    weights, block = request.param
    root = tmp_path_factory.mktemp("quantised")
    checkpoint = write_tiny_checkpoint(root / "model", family="llama", layers=4, hidden_size=64)
    options = ExportOptions(
        split=SplitOptions(encoding_layers=1, decoding_layers=1, cycle_length=3),
        formats=WeightOptions(weights=weights, weights_block=block),
        target="onnxruntime",
        max_num_seqs=3,
        verify=False,
    )
    export_bundle(checkpoint, root / "bundle", options)
    with LLM(root / "bundle", max_num_seqs=3) as opened:
        yield opened


def agree(one: RequestOutput, other: RequestOutput) -> None:
    """Log probabilities are close up to the first other token, which is as likely as what it stands for."""
    [ours], [theirs] = one.outputs, other.outputs
    assert ours.logprobs is not None and theirs.logprobs is not None
    for mine, yours in zip(ours.logprobs, theirs.logprobs, strict=True):
        if mine.token_id != yours.token_id:
            (_, best), (_, second) = mine.top
            assert best - second < CLOSE
            return
        assert abs(mine.logprob - yours.logprob) < CLOSE


def test_company_changes_nothing_but_near_ties(llm: LLM) -> None:
    together = llm.generate(PROMPTS, PARAMS)
    for prompt, beside in zip(PROMPTS, together, strict=True):
        [alone] = llm.generate([prompt], PARAMS, cache_salt=f"{prompt}")
        assert alone.metrics.cached_tokens == 0
        agree(beside, alone)


def test_kept_prefixes_change_nothing_but_near_ties(llm: LLM) -> None:
    for prompt in PROMPTS:
        [first] = llm.generate([prompt], PARAMS, cache_salt="kept")
        [again] = llm.generate([prompt], PARAMS, cache_salt="kept")
        assert again.metrics.cached_tokens >= 32
        agree(first, again)
