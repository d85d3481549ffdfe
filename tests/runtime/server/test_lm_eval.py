"""EleutherAI's harness as a client: its scores are those of the library in process."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from runtime_support import TinyBundles
from server_support import running

from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.server.options import ServerOptions

pytestmark = pytest.mark.timeout(300)

PAIRS = [
    ("The sky is", " blue"),
    ("Two and two are", " four"),
    ("", "So it begins"),
    ("Rain falls on", " the plain in Spain"),
]


@pytest.mark.slow  # ten seconds of imports; test_clients scores the same requests
def test_local_completions_score_as_in_process(tiny: TinyBundles, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny.get().directory
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        with running(directory, ServerOptions(served_model_name=["tiny"])) as server:
            harness = LocalCompletionsAPI(
                base_url=f"{server.url}/completions",
                model="tiny",
                tokenizer=str(Path(directory)),
                tokenizer_backend="huggingface",
                batch_size=2,
                max_length=200,
            )
            requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
            told = harness.loglikelihood(requests)
            asked = Instance("generate_until", {}, ("Once", {"until": ["zz"], "max_gen_toks": 9, "temperature": 0}), 0)
            [written] = harness.generate_until([asked])
            encoded = [harness._encode_pair(*pair) if pair[0] else None for pair in PAIRS]
    with LLM(directory, threads=1) as llm:
        assert llm.tokenizer is not None
        scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        for pair, both, (total, is_greedy) in zip(PAIRS, encoded, told, strict=True):
            if both is None:
                continue  # the harness puts a token of its own before an empty context
            ids, start = [*both[0], *both[1]], len(both[0])
            [output] = llm.generate(ids, scoring)
            scored = [each for each in (output.prompt_logprobs or [])[start:] if each is not None]
            assert total == pytest.approx(sum(each.logprob for each in scored), abs=1e-4), pair
            assert is_greedy == all(each.top[0][0] == each.token_id for each in scored)
        [expected] = llm.generate("Once", SamplingParams(temperature=0, max_tokens=9, stop=["zz"]))
        assert written == expected.outputs[0].text
