"""What evaluation and training read: a document, a multiple-choice question, a question with a programmatic check.

Made by the loaders of this package and by whoever brings items of their own; no model and no tokenizer here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipleChoiceItem:
    """A question whose answer is the likeliest of some continuations."""

    task: str  # e.g. "hellaswag"
    item_id: str
    prompt: str  # plain text before the continuation (not chat)
    choices: tuple[str, ...]  # continuations, with their leading space
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationItem:
    """A question whose answer is written by the model and checked by a function."""

    task: str  # e.g. "facts", "reasoning_gym/chain_sum"
    item_id: str
    messages: tuple[dict[str, str], ...]  # chat messages; rendered with the model's template
    max_new_tokens: int
    score: Callable[[str], float]  # 0..1, programmatic check of the answer text
    chance: float  # score of a guess, 0 for open answers


@dataclass(frozen=True, slots=True, kw_only=True)
class TextItem:
    """A document of prose or documentation."""

    source: str
    text_id: str
    text: str
