"""What tasks and texts are made of: multiple-choice items, generation items and documents. Data only, no torch.

``task_file`` makes the first two; evaluation and decontamination read them. Nothing here loads, renders or scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipleChoiceItem:
    """One question whose answer is the likeliest of several continuations."""

    task: str
    """For example "hellaswag"."""
    item_id: str
    prompt: str
    """Plain text before the continuation (not chat)."""
    choices: tuple[str, ...]
    """The continuations, with their leading space."""
    answer: int
    """Index of the right choice."""
    question: str = ""
    """What is asked, where the prompt puts it into a frame ("Q: ..."); empty where the prompt is the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationItem:
    """One question whose answer the model writes and a program checks."""

    task: str
    """For example "facts"."""
    item_id: str
    messages: tuple[dict[str, str], ...]
    """Chat messages; rendered with the model's template."""
    max_new_tokens: int
    score: Callable[[str], float]
    """Answer text -> 0..1."""
    chance: float
    """Score of a guess, 0 for open answers."""
    rewordings: tuple[tuple[dict[str, str], ...], ...] = ()
    """The same question in other words: whole messages. The item's score is the mean over all its wordings."""

    @property
    def wordings(self) -> tuple[tuple[dict[str, str], ...], ...]:
        """Every way in which the question is asked."""
        return (self.messages, *self.rewordings)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextItem:
    """A document of prose or documentation."""

    source: str
    text_id: str
    text: str
