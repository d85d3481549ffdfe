"""EleutherAI's harness as a client: its scores are those of the library in process."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

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


QUESTIONS = [f"{number} and {number} are" for number in range(6)]


def chat_task(folder: Path, targets: list[str]) -> Path:
    """A task of lm-eval whose data is local: questions that are answered with a few tokens."""
    rows = [{"question": question, "target": target} for question, target in zip(QUESTIONS, targets, strict=True)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local_answer",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n\n", "zz"], "max_gen_toks": 7, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "local_answer.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.mark.slow  # as above
@pytest.mark.filterwarnings("ignore")
def test_local_chat_completions_answer_as_in_process(
    tiny: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import dmtd_export.evaluate.lm_eval_adapter  # noqa: F401 - registers the model by name

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    directory = tiny.get().directory
    with LLM(directory, threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=7, stop=["\n\n", "zz"])
        chats = [llm.chat([{"role": "user", "content": question}], params) for question in QUESTIONS]
        answers = [output.outputs[0].text for [output] in chats]
    folder = chat_task(tmp_path, [*answers[:4], "never", "never"])

    def found(kind: str, /, **arguments: Any) -> tuple[list[str], float]:
        told = simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=["local_answer"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            apply_chat_template=True,
            bootstrap_iters=0,
        )
        assert told is not None
        resps = [sample["resps"][0][0] for sample in told["samples"]["local_answer"]]
        return resps, told["results"]["local_answer"]["exact_match,none"]

    with running(directory, ServerOptions(served_model_name=["tiny"])) as server:
        over_http = found("local-chat-completions", base_url=f"{server.url}/chat/completions", model="tiny")
    in_process = found("dmtd", pretrained=str(directory), threads=1)
    assert over_http == in_process == (answers, pytest.approx(4 / 6))
