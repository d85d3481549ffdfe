"""Chats that a base model writes itself, as far as no decoder is concerned: what is asked for, and where a question stands in the
template.

A run of ``dmtd finetune --answer-tokens`` asks a ``ChatWriter`` for them: decoding is the runtime's business, which this
package does not import, so the writer is handed in (``dmtd_export.chats.write_chats``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from dmtd_models.data.chat import TextTokenizer
from dmtd_models.finetune.shards import AnswersError


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What is to be written, and where."""

    base: Path  # the plain model
    tokenizer: TextTokenizer  # of the base
    directory: Path  # of the shards; what is there already counts
    answer_tokens: int  # stop once so many stand in all shards
    longest: int  # tokens of a prompt with its answer
    questions: Path | None  # prompts to answer; None: the model asks itself
    seed: int
    device: Literal["cpu", "cuda"]
    precision: Literal["bfloat16", "float32"]  # that the device is quick in
    threads: int


class ChatWriter(Protocol):
    """Writes shards of documents (``shards``) until there is enough; ``progress`` is told of the answer tokens so far."""

    def __call__(self, request: ChatRequest, progress: Callable[[int], None]) -> None:
        """Raises AnswersError, DataError or the runtime's own errors, each in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFrame:
    """The template around one user turn, in tokens."""

    before: tuple[int, ...]  # up to where the question starts
    after: tuple[int, ...]  # from its end (first the end-of-turn token) to where the answer starts


def chat_frame(encode: Callable[[str], Sequence[int]], render: Callable[[str], str]) -> ChatFrame:
    """Find what the template puts before and after a question.

    Args:
        encode: rendered text to token ids.
        render: a question to the prompt that asks it.

    Raises:
        AnswersError: the question does not stand in the rendered text exactly once.
    """
    probe = "qxzq"
    parts = render(probe).split(probe)
    if len(parts) != 2:
        raise AnswersError(
            f"chat template: got the question {len(parts) - 1} times in the prompt, expected once; "
            "use a template that repeats nothing"
        )
    before, after = (tuple(encode(part)) for part in parts)
    if not before or not after:
        raise AnswersError("chat template: got nothing around the question, expected turns with their own tokens")
    return ChatFrame(before=before, after=after)
