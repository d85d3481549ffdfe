"""Fluency: how likely the plain base finds what the model writes, and how varied it is, on the fixed everyday prompts.

    prompts --> greedy answers of model and base through the runtime --> base's log-probabilities --> FluencyResult

A mean negative log-likelihood near the base's own means text as the base would write it; a low share of distinct 3-grams
means loops, which are likely too. There is no right answer to check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dmtd_export.evaluate.generation import Answer, GenerationRun, write_answers
from dmtd_export.evaluate.scorer import Scorer, ScoreRequest
from dmtd_export.evaluate.statistics import Bootstrap, Estimate
from dmtd_models.data.items import GenerationItem
from dmtd_models.data.repetition import distinct_share

MAX_NEW_TOKENS = 96
EVERYDAY = (
    "What is a good way to start the morning?",
    "Can you explain why the sky looks blue during the day?",
    "Tell me a short story about a fox who learns to share.",
    "I have a job interview tomorrow. What should I do to prepare?",
    "How do I cook rice so that it does not stick?",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "What are some healthy snacks for children?",
    "Explain how a bicycle stays upright, in simple words.",
    "My friend is feeling sad. How can I cheer her up?",
    "What should I pack for a weekend trip to the mountains?",
    "Write a short poem about rain in autumn.",
    "How does a refrigerator keep food cold?",
    "Give me three ideas for a birthday party at home.",
    "What is the difference between a lake and a river?",
    "Tell me a story about an old lighthouse keeper and a lost boat.",
    "How can I fall asleep faster at night?",
    "Why is it important to learn to read?",
    "Write an email asking my landlord to repair the heating.",
    "What makes a good friend?",
    "Describe a walk through a busy market on a summer day.",
)
"""Questions, advice, small stories and explanations: no single right answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """What one model wrote. ``nll`` in nats a token under the plain base; ``distinct_3grams`` the mean share of each text."""

    texts: tuple[str, ...]
    nll: Estimate
    distinct_3grams: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FluencyResult:
    """The model under its cycles, and the plain base on the same prompts."""

    prompts: tuple[str, ...]
    model: Voice
    base: Voice


def everyday_items() -> list[GenerationItem]:
    """The fixed prompts as items without a right answer."""
    return [
        GenerationItem(
            task="everyday",
            item_id=str(number),
            messages=({"role": "user", "content": prompt},),
            max_new_tokens=MAX_NEW_TOKENS,
            score=lambda text: float(bool(text.strip())),
            chance=0.0,
        )
        for number, prompt in enumerate(EVERYDAY)
    ]


def measure_fluency(
    model: GenerationRun,
    base: GenerationRun,
    scorer: Scorer,
    bootstrap: Bootstrap,
    on_done: Callable[[int], None] = lambda count: None,
) -> FluencyResult:
    """Let both write, and the base's ``scorer`` read."""
    items = everyday_items()
    ours, theirs = (voice_of(write_answers(run, items, on_done), scorer, bootstrap) for run in (model, base))
    return FluencyResult(prompts=EVERYDAY, model=ours, base=theirs)


def voice_of(answers: Sequence[Answer], scorer: Scorer, bootstrap: Bootstrap) -> Voice:
    """What was written, as the base's ``scorer`` reads it."""
    sums = []
    for answer in answers:
        n = len(answer.prompt_ids)
        request = ScoreRequest(
            token_ids=(*answer.prompt_ids, *answer.token_ids), prompt_len=n, plain=True, first_row=n - 1
        )
        [scores] = scorer.score([request])
        sums.append((-float(scores.target_logprobs.sum()), len(answer.token_ids)))
    return Voice(
        texts=tuple(answer.text for answer in answers),
        nll=bootstrap.estimate(np.array(sums, dtype=np.float64), lambda s: s[..., 0] / s[..., 1]),
        distinct_3grams=float(np.mean([distinct_share(answer.token_ids, 3) for answer in answers])),
    )
