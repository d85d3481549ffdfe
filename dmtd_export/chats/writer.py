"""The base model writes training text: answers to a user's prompts, or to questions that it asks itself.

    base -> a temporary bundle -> dmtd_runtime.LLM, plain, in batches -> shards of JSON lines that ``--data`` reads

A round is so many numbered documents: their questions (sampled behind the template's opening of a user turn, where none are
given), then the answers, then a shard. Which tokens are drawn hangs on (seed, number) alone, but for rounding. Documents are not
judged but for faults: an empty answer, a loop, a special token inside, a question that was asked before.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dmtd_export.bundle.export import export_bundle, quiet_export, runnable_target
from dmtd_export.chats.questions import Conversation, read_questions
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import ANY_SPLIT
from dmtd_models.data.repetition import is_loop, number_ids
from dmtd_models.finetune.self_written import ChatFrame, ChatRequest, chat_frame
from dmtd_models.finetune.shards import AnswersError, Document, RunState, ShardStore
from dmtd_runtime import LLM, SamplingParams

logger = logging.getLogger("dmtd.chats")

MAX_BATCH = {"cpu": 16, "cuda": 64}
MIN_QUESTION_LEN, MAX_QUESTION_LEN, MAX_ANSWER_LEN = 4, 200, 400
QUESTION_TEMPERATURE, TOP_P = 1.0, 0.95
ANSWER_TEMPERATURES = (0.7, 0.7, 0.0, 1.0)
"""Drawn evenly for each document: half moderate, a quarter greedy, a quarter free."""
MAX_WASTED = 200
"""Documents in a row that are of no use, after which it is not going to get better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """A document before its answer."""

    number: int
    kind: str
    ids: tuple[int, ...]


def write_chats(request: ChatRequest, progress: Callable[[int], None]) -> None:
    """Write until ``request.answer_tokens`` stand in the directory, or every given prompt has its answer.

    A stopped run goes on: a shard is written whole and counts, what was under way is written anew.

    Raises:
        AnswersError: a template that cannot be split around the question, a base without an end token, a directory begun with
            other options, or a base that writes nothing of use.
        DataError: prompts that cannot be read.
        DmtdError: the base cannot be exported, or the runtime cannot run it.
    """
    questions = None if request.questions is None else read_questions(request.questions)
    store = ShardStore(request.directory, seed=request.seed, options=_recorded(request))
    state = store.load()
    if _enough(request, state, questions):
        return
    progress(state.answer_tokens)
    with _opened(request) as llm:
        writer = _Writer(llm, request, questions, store, state)
        wasted = 0
        while not _enough(request, state, questions):
            before = state.documents
            writer.round()
            progress(state.answer_tokens)
            wasted = 0 if state.documents > before else wasted + writer.documents
            if wasted >= MAX_WASTED and questions is None:
                reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(state.dropped.items()))
                raise AnswersError(
                    f"chats: got none of use from {request.base} ({reasons}); give --questions FILE, or a model that chats"
                )
    if state.answer_tokens < request.answer_tokens:
        logger.warning(
            "%s: all %d prompts are used, and gave %d of %d answer tokens",
            request.questions, state.next_index, state.answer_tokens, request.answer_tokens,
        )  # fmt: skip


def _enough(request: ChatRequest, state: RunState, questions: Sequence[Conversation] | None) -> bool:
    used_up = questions is not None and state.next_index >= len(questions)
    return used_up or state.answer_tokens >= request.answer_tokens


def _recorded(request: ChatRequest) -> dict[str, object]:
    """What must be the same for a run to go on."""
    asked = request.questions
    digest = None
    if asked is not None and asked.is_file():
        digest = hashlib.sha256(asked.read_bytes()).hexdigest()
    return {
        "writer": 1,
        "longest": request.longest,
        "questions": None if asked is None else str(asked),
        "digest": digest,
    }


@contextlib.contextmanager
def _opened(request: ChatRequest) -> Iterator[LLM]:
    """The base as a bundle that lasts as long as the block."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    if request.device == "cuda":  # whose provider takes no float32 bundle
        dtype = "bfloat16" if request.precision == "bfloat16" else "float16"
    request.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=request.directory) as work:
        bundle = Path(work) / "bundle"
        with open_checkpoint(request.base) as checkpoint:
            target = runnable_target(checkpoint.config.head_dim)
            eos_token_ids = checkpoint.config.eos_token_ids
        if not eos_token_ids:
            raise AnswersError("model: got no end-of-sequence token, expected one that ends a turn; set eos_token_id")
        options = ExportOptions(
            split=ANY_SPLIT,
            target=target,
            dtype=dtype,
            formats=WeightOptions(weights="float"),
            max_num_seqs=MAX_BATCH[request.device],
            max_model_len=request.longest,
            verify=False,
        )
        with quiet_export():
            export_bundle(request.base, bundle, options)
        batch = MAX_BATCH[request.device]
        with LLM(bundle, plain=True, device=request.device, threads=request.threads, max_num_seqs=batch) as llm:
            yield llm


@dataclass(slots=True)
class _Writer:
    """Rounds over one open base."""

    llm: LLM
    request: ChatRequest
    questions: Sequence[Conversation] | None
    store: ShardStore
    state: RunState
    frame: ChatFrame = field(init=False)
    asked: set[tuple[int, ...]] = field(init=False)
    end_ids: frozenset[int] = field(init=False)
    special_ids: frozenset[int] = field(init=False)
    numbers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = self.request.tokenizer
        self.frame = chat_frame(
            tokenizer.encode_rendered,
            lambda question: tokenizer.render([{"role": "user", "content": question}], add_generation_prompt=True),
        )
        self.asked = {tuple(document["prompt_ids"]) for document in self.store.documents(self.state)}
        self.end_ids = frozenset(self.llm.manifest.model.eos_token_ids)
        # A special token inside a text means that the model has left its turn.
        self.special_ids = tokenizer.special_ids - self.end_ids
        self.numbers = number_ids(tokenizer.tokenizer.get_vocab())

    @property
    def documents(self) -> int:
        """Of a round: a little text has small shards, so that not much more is written than was asked for."""
        return max(4, min(4 * MAX_BATCH[self.request.device], self.request.answer_tokens // 400))

    @property
    def answer_len(self) -> int:
        return min(MAX_ANSWER_LEN, self.request.longest // 2)

    def round(self) -> None:
        """Write one shard and count it."""
        state, dropped = self.state, Counter(self.state.dropped)
        numbers = range(state.next_index, state.next_index + self.documents)
        if self.questions is None:
            prompts = list(self._ask(numbers, dropped))
        else:
            prompts = list(self._given(self.questions, numbers, dropped))
        documents = list(self._answer(prompts, dropped))
        state.next_index = numbers.stop if self.questions is None else min(numbers.stop, len(self.questions))
        state.dropped = dict(dropped)
        self.store.commit(documents, state)

    def _given(
        self, questions: Sequence[Conversation], numbers: Sequence[int], dropped: Counter[str]
    ) -> Iterator[_Prompt]:
        tokenizer = self.request.tokenizer
        for number in numbers[: max(0, len(questions) - numbers[0])]:
            ids = tuple(tokenizer.encode_rendered(tokenizer.render(questions[number], add_generation_prompt=True)))
            if len(ids) + self.answer_len > self.request.longest:
                dropped["long prompt"] += 1
            elif self._is_new(ids, dropped):
                yield _Prompt(number=number, kind="given", ids=ids)

    def _ask(self, numbers: Sequence[int], dropped: Counter[str]) -> Iterator[_Prompt]:
        """Questions that the model makes up, framed as the template frames them."""
        room = self.request.longest - self.answer_len - len(self.frame.before) - len(self.frame.after)
        longest = min(MAX_QUESTION_LEN, room)
        if longest < MIN_QUESTION_LEN:
            raise AnswersError(
                f"lengths: got {self.request.longest} tokens for question and answer, which leaves no room for a question; "
                "raise --max-length"
            )
        params = [self._params(number, 0, QUESTION_TEMPERATURE, longest + 1) for number in numbers]
        outputs = self.llm.generate([list(self.frame.before) for _ in numbers], params)
        for number, output in zip(numbers, outputs, strict=True):
            *question, last = output.outputs[0].token_ids
            if (
                last != self.frame.after[0]
                or len(question) < MIN_QUESTION_LEN
                or not self.special_ids.isdisjoint(question)
            ):
                dropped["question"] += 1
                continue
            ids = (*self.frame.before, *question, *self.frame.after)
            if self._is_new(ids, dropped):
                yield _Prompt(number=number, kind="self", ids=ids)

    def _answer(self, prompts: Sequence[_Prompt], dropped: Counter[str]) -> Iterator[Document]:
        if not prompts:
            return
        params = []
        for prompt in prompts:
            rng = np.random.default_rng([self.request.seed, prompt.number])
            temperature = ANSWER_TEMPERATURES[int(rng.integers(len(ANSWER_TEMPERATURES)))]
            params.append(self._params(prompt.number, 1, temperature, self.answer_len))
        for prompt, output in zip(prompts, self.llm.generate([list(p.ids) for p in prompts], params), strict=True):
            answer = output.outputs[0].token_ids
            fault = self._fault(answer)
            if fault is not None:
                dropped[fault] += 1
                continue
            yield Document(
                index=prompt.number,
                kind=prompt.kind,
                prompt_ids=list(prompt.ids),
                answer_ids=list(answer),
                finish="stop" if answer[-1] in self.end_ids else "length",
            )

    def _fault(self, answer: Sequence[int]) -> str | None:
        if not self.special_ids.isdisjoint(answer):
            return "special"
        if not self.request.tokenizer.decode(answer).strip():
            return "empty"
        return "loop" if is_loop(answer, self.numbers) else None

    def _is_new(self, ids: tuple[int, ...], dropped: Counter[str]) -> bool:
        if ids in self.asked:
            dropped["repeated"] += 1
            return False
        self.asked.add(ids)
        return True

    def _params(self, number: int, station: int, temperature: float, max_tokens: int) -> SamplingParams:
        drawn = np.random.SeedSequence([self.request.seed, number, station]).generate_state(1, np.uint64)
        return SamplingParams(temperature=temperature, top_p=TOP_P, seed=int(drawn[0] >> 1), max_tokens=max_tokens)
