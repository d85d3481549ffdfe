"""Generation tasks: every wording of a question is answered through the runtime, an item's score is the mean over them."""

from __future__ import annotations

from pathlib import Path

import torch

from dmtd_export.evaluate.generation import Answer, GenerationRun, compare_answers, write_answers
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.data.items import GenerationItem
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import greedy
from dmtd_runtime.text.tokenizer import Tokenizer


def asked(question: str, *others: str, tokens: int = 5) -> GenerationItem:
    """A question that is answered by the word Paris."""
    first, *rest = (({"role": "user", "content": text},) for text in (question, *others))
    return GenerationItem(
        task="t",
        item_id=question,
        messages=first,
        max_new_tokens=tokens,
        score=lambda text: float("Paris" in text),
        chance=0.0,
        rewordings=tuple(rest),
    )


def test_every_wording_is_answered_in_order(checkpoint: Path, bundle: Path) -> None:
    items = [asked("One?", "Say: one?", "One, please?"), asked("Two?", tokens=3)]
    done: list[int] = []
    answers = write_answers(GenerationRun(bundle=bundle, plain=False, threads=1), items, done.append)
    assert sum(done) == len(answers) == 4
    with open_checkpoint(checkpoint) as opened:
        assert opened.dmtd is not None
        model = DmtdModel.from_reader(opened.config, opened.dmtd, opened.read, torch.float64)
    tokenizer = Tokenizer.from_directory(checkpoint)
    assert tokenizer is not None
    questions = [("One?", 5), ("Say: one?", 5), ("One, please?", 5), ("Two?", 3)]
    for (question, tokens), answer in zip(questions, answers, strict=True):
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert answer.prompt_ids == tuple(ids)
        assert answer.token_ids == greedy(model, ids, tokens, stop_ids=(258,)).token_ids


def test_an_items_score_is_the_mean_over_its_wordings() -> None:
    def said(*texts: str) -> list[Answer]:
        return [Answer(text=text, prompt_ids=(), token_ids=()) for text in texts]

    items = [asked("a", "b", "c"), asked("d")]
    found = compare_answers(items, said("Paris", "Lyon", "Paris.", "Lyon"), said("Paris", "Paris", "Paris", "Paris"))
    assert found.scores.model.tolist() == [2 / 3, 0.0] and found.scores.base.tolist() == [1.0, 1.0]
    assert found.scores.solved == (2, 1) and found.items == 2
    assert found.same_text == 0.25
