"""The base model writes training text: questions, its own or given ones, and its answers to them.

First station of fine-tuning on self-written data: ``write_answers`` turns numbered prompts into shards of JSON lines,
which the data reader takes as they are. Tokens are chosen here; ``decode`` computes the logits, ``questions`` makes the
prompts. Documents are not judged here but for two faults, an empty answer and a loop.

One line a document, over the chat template's own rendering (system turn included):

    {"index": 17, "kind": "self", "prompt_ids": [...], "answer_ids": [...], "finish": "stop"}

``answer_ids`` ends with the token that ended it if ``finish`` is ``stop``; at ``length`` the answer was cut. Every
choice follows from (seed, index), so the same run gives the same documents but for rounding, in whatever order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dmtd_models.data.repetition import TAIL, is_loop, number_ids
from dmtd_models.finetune.self_written import ChatFrame, chat_frame
from dmtd_models.finetune.shards import AnswersError, Document, ShardStore
from dmtd_models.reference.dmtd import DmtdModel
from study.decode import SlotDecoder

Render = Callable[[str], str]

_CANDIDATES = 128  # tokens a step chooses from
_ARRANGE_STEPS = 32  # long enough to cost nothing, short against a document


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a document starts from."""

    kind: str  # self, template, fact, gym: carried into the document
    question: str | None  # None: the model writes the question, too


PromptSource = Callable[[int], Prompt]  # endless; the same prompt for the same number


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How tokens are drawn: temperature 0 is greedy; ``top_p`` keeps the smallest set of that probability."""

    temperature: float
    top_p: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How many documents, how long, how drawn."""

    answer_tokens: int  # stop at a shard's end once this many stand in all shards
    seed: int = 0
    slots: int = 64
    length_groups: int = 4  # slots are kept by length in so many groups; 1 suits a GPU
    shard_documents: int = 256
    max_answer_len: int = 400
    min_question_len: int = 4
    max_question_len: int = 200
    question_style: Style = Style(temperature=1.0)
    # Drawn evenly for each document: half moderate, a quarter greedy, a quarter free.
    answer_styles: tuple[Style, ...] = (
        Style(temperature=0.7),
        Style(temperature=0.7),
        Style(temperature=0.0),
        Style(temperature=1.0),
    )
    # Shares of 4-grams that differ from each other, below which an answer is a loop: of its tokens, and, where numbers
    # count up in it, of the others among its last hundred.
    min_distinct_4grams: float = 0.5
    min_distinct_tail: float = 0.3

    def __post_init__(self) -> None:
        """Refuse what no run could honour."""
        for name in ("answer_tokens", "slots", "length_groups", "shard_documents", "max_answer_len"):
            if getattr(self, name) < 1:
                raise AnswersError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if self.seed < 0:
            raise AnswersError(f"seed: got {self.seed}, expected 0 or more")
        if self.min_question_len > self.max_question_len:
            raise AnswersError(
                f"question lengths: got at least {self.min_question_len} and at most {self.max_question_len} tokens"
                ", expected a range; lower min_question_len"
            )
        if not self.answer_styles:
            raise AnswersError("answer_styles: got none, expected one or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardProgress:
    """Totals after a shard was written, this seed's earlier runs included."""

    shard: Path
    documents: int
    answer_tokens: int
    dropped: dict[str, int]  # by reason: loop, empty, special, question, repeated


@dataclass(slots=True, kw_only=True)
class _Slot:
    """One document on its way. ``ids`` are fed or about to be; ``forced`` wait to be fed before anything is drawn."""

    index: int
    kind: str
    ids: list[int]
    forced: deque[int]
    style: Style
    uniforms: np.ndarray
    position: int
    answer_start: int | None  # None: the question is being written

    def random(self) -> float:
        """The uniform number that belongs to the present length."""
        return float(self.uniforms[len(self.ids)])


def write_answers(
    model: DmtdModel,
    tokenizer: Tokenizer,
    render: Render,
    prompts: PromptSource,
    output: Path,
    options: AnswerOptions,
    *,
    progress: Callable[[ShardProgress], None] | None = None,
) -> ShardProgress:
    """Write documents into ``output`` until it holds ``options.answer_tokens``; a run that was stopped goes on.

    Shards are ``answers-<seed>-<number>.jsonl`` and appear whole; ``.answers-<seed>.json`` says what is committed.
    Runs with different seeds may share the directory. A kill loses the documents since the last shard.

    Args:
        model: the base model; its plain mode is used, whatever its split. Its device and type are those of the work.
        tokenizer: of the checkpoint.
        render: the chat template for one user message with the opening of the answer, as text.
        prompts: the prompt of each number from 0; must give the same one when asked again.
        output: a directory; made if missing.
        options: lengths, styles, seed.
        progress: called after each shard.

    Raises:
        AnswersError: a template that cannot be split around the question, a model without an end token or with too
            few positions, a directory begun with other options, or one that cannot be written.
    """
    frame = chat_frame(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, render)
    # How much and in what portions may change between runs.
    recorded = asdict(options)
    for name in ("answer_tokens", "slots", "length_groups", "shard_documents"):
        del recorded[name]
    store = ShardStore(output, seed=options.seed, options=recorded)
    return _Writer(model, tokenizer, render, frame, prompts, store, options, progress).run()


def choose(logits: Tensor, styles: Sequence[Style], uniforms: Sequence[float]) -> list[int]:
    """Draw one candidate a row; a row's choice depends on no other row.

    Args:
        logits: [rows, candidates], sorted from the largest. ``top_p`` counts within them: a softmax over a large
            vocabulary costs more than it changes.
        styles: one a row.
        uniforms: one number in [0, 1) a row.

    Returns:
        The place of the chosen candidate in each row.
    """
    temperature = torch.tensor([style.temperature for style in styles], device=logits.device)[:, None]
    top_p = torch.tensor([style.top_p for style in styles], device=logits.device)[:, None]
    drawn = torch.tensor(uniforms, device=logits.device)[:, None]
    share = torch.softmax(logits / temperature.clamp_min(1e-6), dim=-1)
    below = share.cumsum(-1) - share
    share = share.masked_fill(below >= top_p, 0.0)
    share[:, 0] = share[:, 0].clamp_min(torch.finfo(share.dtype).tiny)
    cumulated = share.cumsum(-1)
    picked = (cumulated <= drawn * cumulated[:, -1:]).sum(-1, keepdim=True)
    # Rounding may pass the last candidate that has a share.
    picked = torch.minimum(picked, (share > 0).sum(-1, keepdim=True) - 1)
    picked = picked.masked_fill(temperature == 0, 0)
    return picked.squeeze(-1).tolist()


class _Writer:
    """One run: fills slots, feeds them a token a step, files what is finished."""

    def __init__(
        self,
        model: DmtdModel,
        tokenizer: Tokenizer,
        render: Render,
        frame: ChatFrame,
        prompts: PromptSource,
        store: ShardStore,
        options: AnswerOptions,
        progress: Callable[[ShardProgress], None] | None,
    ) -> None:
        self.tokenizer, self.render, self.prompts = tokenizer, render, prompts
        self.frame, self.options, self.store, self.progress = frame, options, store, progress
        self.end_ids = frozenset(model.config.eos_token_ids)
        if not self.end_ids:
            raise AnswersError("model: got no end-of-sequence token, expected one that ends a turn; set eos_token_id")
        # A special token inside a text means that the model has left its turn.
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special) - self.end_ids
        self.number_ids = number_ids(tokenizer.get_vocab())
        capacity = len(frame.before) + len(frame.after) + options.max_question_len + options.max_answer_len + 2
        if capacity > model.config.max_positions:
            raise AnswersError(
                f"lengths: got up to {capacity} tokens a document, expected at most the model's "
                f"{model.config.max_positions} positions; lower max_answer_len or max_question_len"
            )
        self.capacity = capacity
        self.decoder = SlotDecoder(model, slots=options.slots, capacity=capacity, groups=options.length_groups)
        self.steps = 0
        # The last token of the frame is fed by each document itself: its logits begin the question.
        self.decoder.set_prefix(frame.before[:-1])
        self.finished: list[Document] = []
        self.state = store.load()
        self.queue = deque(self.state.pending)
        before, after = len(frame.before), -len(frame.after)
        self.questions = {tuple(document["prompt_ids"][before:after]) for document in store.documents(self.state)}
        self.slots = [self._begin(number) for number in range(options.slots)]

    def run(self) -> ShardProgress:
        """Work until there is enough."""
        report = self._report()
        while self.state.answer_tokens < self.options.answer_tokens:
            self._step()
            if len(self.finished) >= self.options.shard_documents:
                self.state.pending = [*(slot.index for slot in self.slots), *self.queue]
                self.store.commit(self.finished, self.state)
                self.finished = []
                report = self._report()
                if self.progress is not None:
                    self.progress(report)
        return report

    def _step(self) -> None:
        self.steps += 1
        if self.steps % _ARRANGE_STEPS == 0:
            order = self.decoder.arrange([slot.position for slot in self.slots])
            self.slots = [self.slots[number] for number in order]
        device = self.decoder.device
        fed = [slot.ids[slot.position] for slot in self.slots]
        positions = [slot.position for slot in self.slots]
        hidden = self.decoder.step(fed, positions)
        drawing = []
        for number, slot in enumerate(self.slots):
            slot.position += 1
            if slot.forced:
                slot.ids.append(slot.forced.popleft())
            else:
                drawing.append(number)
        if not drawing:
            return
        chosen = [self.slots[number] for number in drawing]
        styles = [self.options.question_style if slot.answer_start is None else slot.style for slot in chosen]
        logits, candidates = self.decoder.candidates(hidden[torch.tensor(drawing, device=device)], _CANDIDATES)
        places = choose(logits, styles, [slot.random() for slot in chosen])
        tokens = candidates[torch.arange(len(places), device=device), torch.tensor(places, device=device)].tolist()
        for number, token in zip(drawing, tokens, strict=True):
            if self._take(self.slots[number], token):
                self.slots[number] = self._begin(number)

    def _take(self, slot: _Slot, token: int) -> bool:
        """Add a drawn token; True if the slot is free again."""
        if token in self.special_ids:
            return self._drop("special")
        slot.ids.append(token)
        if slot.answer_start is None:
            return self._take_question(slot, token)
        answer = slot.ids[slot.answer_start :]
        ended = token in self.end_ids or len(answer) == self.options.max_answer_len
        if not ended:
            # A loop is seen early: it would fill its slot to the end.
            return len(answer) % TAIL == 0 and self._is_loop(answer) and self._drop("loop")
        if not self.tokenizer.decode(answer).strip():
            return self._drop("empty")
        if self._is_loop(answer):
            return self._drop("loop")
        self.finished.append(
            Document(
                index=slot.index,
                kind=slot.kind,
                prompt_ids=slot.ids[: slot.answer_start],
                answer_ids=answer,
                finish="stop" if token in self.end_ids else "length",
            )
        )
        return True

    def _is_loop(self, answer: Sequence[int]) -> bool:
        given = self.options
        return is_loop(
            answer, self.number_ids, least_distinct=given.min_distinct_4grams, least_tail=given.min_distinct_tail
        )

    def _take_question(self, slot: _Slot, token: int) -> bool:
        question = slot.ids[len(self.frame.before) :]
        if token not in self.end_ids:
            return self._drop("question") if len(question) > self.options.max_question_len else False
        if len(question) - 1 < self.options.min_question_len or token != self.frame.after[0]:
            return self._drop("question")
        if self._repeated(question[:-1]):
            return self._drop("repeated")
        slot.forced.extend(self.frame.after[1:])
        slot.answer_start = len(slot.ids) + len(slot.forced)
        return False

    def _begin(self, number: int) -> _Slot:
        """Put the next usable prompt into a slot."""
        while True:
            index = self.queue.popleft() if self.queue else self._next_index()
            prompt = self.prompts(index)
            rng = np.random.default_rng([self.options.seed, index])
            style = self.options.answer_styles[int(rng.integers(len(self.options.answer_styles)))]
            before = self.frame.before
            whole = before if prompt.question is None else self._prompt_ids(prompt.question)
            if prompt.question is not None:
                question_len = len(whole) - len(before) - len(self.frame.after)
                if whole[: len(before)] != before or question_len > self.options.max_question_len:
                    self._drop("question")
                    continue
                if self._repeated(whole[len(before) : len(before) + question_len]):
                    self._drop("repeated")
                    continue
            start = self.decoder.restart(number)
            return _Slot(
                index=index,
                kind=prompt.kind,
                ids=list(whole[: start + 1]),
                forced=deque(whole[start + 1 :]),
                style=style,
                uniforms=rng.random(self.capacity + 1),
                position=start,
                answer_start=None if prompt.question is None else len(whole),
            )

    def _prompt_ids(self, question: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.render(question), add_special_tokens=False).ids)

    def _next_index(self) -> int:
        self.state.next_index += 1
        return self.state.next_index - 1

    def _repeated(self, question: Iterable[int]) -> bool:
        key = tuple(question)
        if key in self.questions:
            return True
        self.questions.add(key)
        return False

    def _drop(self, reason: Literal["loop", "empty", "special", "question", "repeated"]) -> bool:
        self.state.dropped[reason] = self.state.dropped.get(reason, 0) + 1
        return True

    def _report(self) -> ShardProgress:
        state = self.state
        return ShardProgress(
            shard=self.store.shard(max(0, state.shards - 1)),
            documents=state.documents,
            answer_tokens=state.answer_tokens,
            dropped=dict(state.dropped),
        )
