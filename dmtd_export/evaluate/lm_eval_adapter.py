"""EleutherAI's lm-eval harness over a DMTD model: its own tasks (ARC, WinoGrande, GSM8K, CoQA, MBPP+ ...) on ours.

    dmtd evaluate MODEL --base BASE --lm-eval arc_challenge,gsm8k
    python -m dmtd_export.evaluate.lm_eval_adapter run --model dmtd --model_args pretrained=MODEL --tasks gsm8k

The second form is the harness's own command line with the model ``dmtd`` registered. Log-likelihoods come from a Scorer, with
the context as the prompt; generated text comes from the real runtime. Imports lm_eval (extra ``lm-eval``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.options import OpenOptions
from dmtd_export.evaluate.scorer import ScoreRequest
from dmtd_export.evaluate.subject import Subject, open_subject
from dmtd_models.config.model import SplitOptions
from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256
SCORE_BATCH = 64  # requests handed to the scorer at a time


@register_model("dmtd")
class DmtdLM(TemplateLM):  # type: ignore[misc]  # the harness is not followed
    """A checkpoint or a bundle for the harness.

    Args:
        pretrained: the checkpoint or bundle.
        plain: run every layer for every token: the baseline.
        run_on: cpu or cuda.
        dtype: of a checkpoint in memory.
        threads: of the computation; None: the libraries' own choice.
        decoding_layers: with the four below, the split of a checkpoint that records none.
        encoding_layers: see ``dmtd export``.
        cycle_length: see ``dmtd export``.
        cycle_origin: see ``dmtd export``.
        prompt_input: see ``dmtd export``.
        batch_size: the harness's; both scorers batch as they see fit.
        max_batch_size: as batch_size.
        device: the harness's, which is cuda:0 wherever nothing else is said; see ``run_on``.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        plain: bool = False,
        run_on: Literal["cpu", "cuda"] = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        threads: int | None = None,
        decoding_layers: int | None = None,
        encoding_layers: int | None = None,
        cycle_length: int | None = None,
        cycle_origin: Literal["absolute", "prompt"] | None = None,
        prompt_input: Literal["cyclical", "thinking", "sum"] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        split = SplitOptions(
            encoding_layers=encoding_layers,
            decoding_layers=decoding_layers,
            cycle_length=cycle_length,
            cycle_origin=cycle_origin,
            prompt_input=prompt_input,
        )
        opening = OpenOptions(split=split, device=run_on, dtype=dtype, threads=threads)
        self._opened = contextlib.ExitStack()
        subject = self._opened.enter_context(open_subject(Path(pretrained), opening, plain_only=plain))
        self._attach(subject, opening, plain)

    @classmethod
    def over(cls, subject: Subject, opening: OpenOptions, *, plain: bool) -> DmtdLM:
        """The adapter over a model that is open already and stays its opener's."""
        made = cls.__new__(cls)
        made._opened = contextlib.ExitStack()
        made._attach(subject, opening, plain)
        return made

    def _attach(self, subject: Subject, opening: OpenOptions, plain: bool) -> None:
        super().__init__()
        if subject.tokenizer is None:
            raise EvaluateError(f"{subject.path}: has no tokenizer.json, which lm-eval needs; add it to the checkpoint")
        self._subject, self._opening, self._plain = subject, opening, plain
        self._text: Tokenizer = subject.tokenizer
        self._llm: LLM | None = None

    def close(self) -> None:
        """Free what was opened here."""
        if self._llm is not None:
            self._llm.close()
        self._opened.close()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        ids = self._text.eos_token_ids
        if not ids:
            raise EvaluateError(
                f"{self._subject.path}: names no end-of-sequence token; add eos_token_id to config.json"
            )
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        begin = self._text.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Names the requests' cache."""
        return str(self._subject.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; a text that begins with BOS, from a chat template, gets no second one."""
        if add_special_tokens is None:
            begin = self._text.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return self._text.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt that the model's template makes of a conversation."""
        from dmtd_runtime.text.chat_template import ChatTemplate

        template = ChatTemplate.from_directory(self._subject.assets)
        if template is None:
            raise EvaluateError(f"{self._subject.path}: has no chat template; leave --apply_chat_template out")
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The harness records it; rendering is ours."""
        return "" if chat_template else None

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would write it) of each continuation; long contexts lose their left."""
        results: list[tuple[float, bool]] = []
        for start in range(0, len(requests), SCORE_BATCH):
            part = requests[start : start + SCORE_BATCH]
            results += self._score([(context, continuation) for _, context, continuation in part])
            for (strings, _, _), result in zip(part, results[start:], strict=True):
                self.cache_hook.add_partial("loglikelihood", strings, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's length. Such a text is no prompt: cycles run through it."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._subject.scorer.max_len - 1,
                    context_len=1,
                ),
            )
            total = sum(logprob for logprob, _ in self._score([(list(c), list(t)) for c, t in windows]))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text through the runtime, until a stop string or the end of sequence."""
        llm = self._runtime()
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        for request in requests:
            text, raw = request.args
            options = normalize_gen_kwargs(raw, MAX_NEW_TOKENS)
            room = llm.max_model_len
            new = max(1, min(int(options["max_gen_toks"]), room // 2))
            prompts.append(self.tok_encode(text)[-(room - new) :])
            params.append(_sampling(options, new))
        outputs = llm.generate(prompts, params)
        answers = [output.outputs[0].text for output in outputs]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _runtime(self) -> LLM:
        if self._llm is None:
            bundle = self._subject.generation_bundle()
            slots = max(graph.slots for graph in load_manifest(bundle).graphs)
            self._llm = LLM(
                bundle,
                device=self._opening.device,
                threads=self._opening.threads,
                plain=self._plain,
                max_num_seqs=slots,
            )
        return self._llm

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        made = []
        for context, continuation in pairs:
            ids = (*context, *continuation)[-self._subject.scorer.max_len :]
            prompt_len = max(1, len(ids) - len(continuation))
            made.append(ScoreRequest(token_ids=ids, prompt_len=prompt_len, plain=self._plain, first_row=prompt_len - 1))
        scores = self._subject.scorer.score(made)
        return [
            (float(s.target_logprobs.sum()), bool((s.top1[:-1] == r.token_ids[r.first_row + 1 :]).all()))
            for r, s in zip(made, scores, strict=True)
        ]


def _sampling(options: Any, max_tokens: int) -> SamplingParams:
    """The harness's generation options; greedy unless the task samples."""
    stop = tuple(text for text in options["until"] if text)
    if not options.get("do_sample"):
        return SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop)
    return SamplingParams(
        temperature=float(options.get("temperature") or 1.0),
        top_p=float(options.get("top_p", 1.0)),
        top_k=int(options.get("top_k", 0)),
        max_tokens=max_tokens,
        stop=stop,
        seed=0,
    )


def main() -> None:
    """The harness's own command line, with the model ``dmtd`` known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
