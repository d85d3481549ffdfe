"""Generation tasks through the real runtime: ``dmtd_runtime.LLM`` over a bundle, greedy, in batches.

The model answers under its cycles, the base in plain mode; each answer is checked by the item's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.statistics import PairedScores
from dmtd_models.text.items import GenerationItem
from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.manifest import load_manifest

MAX_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRun:
    """Where and how answers are written. ``threads`` None: one for each core."""

    bundle: Path
    plain: bool
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was asked, as tokens, and what was written; ``token_ids`` ends with the stop token if one was chosen."""

    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """``same_text``: share of the answers that equal the base's word for word."""

    scores: PairedScores
    same_text: float
    items: int


def write_answers(
    run: GenerationRun, items: Sequence[GenerationItem], on_done: Callable[[int], None] = lambda count: None
) -> list[Answer]:
    """The greedy answer to every item, in order.

    Raises:
        EvaluateError: the bundle has no chat template.
        DmtdError: what the runtime refuses.
    """
    slots = max(graph.slots for graph in load_manifest(run.bundle).graphs)
    batch = min(MAX_BATCH, len(items), slots)
    with LLM(run.bundle, device=run.device, threads=run.threads, plain=run.plain, max_num_seqs=batch) as llm:
        if not llm.has_chat_template or llm.tokenizer is None:
            raise EvaluateError(
                f"{run.bundle}: generation tasks need a tokenizer and a chat template; add them to the checkpoint"
            )
        answers: list[Answer] = []
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            prompts = [llm.tokenizer.encode(llm.render_chat(i.messages), add_special_tokens=False) for i in part]
            params = [SamplingParams(temperature=0, max_tokens=item.max_new_tokens) for item in part]
            for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
                [written] = output.outputs
                answers.append(Answer(text=written.text, prompt_ids=tuple(prompt), token_ids=tuple(written.token_ids)))
            on_done(len(part))
    return answers


def compare_answers(
    items: Sequence[GenerationItem], model: Sequence[Answer], base: Sequence[Answer]
) -> GenerationResult:
    """Check both sides' answers to the items."""
    return GenerationResult(
        scores=PairedScores(
            name=items[0].task,
            model=_checked(items, model),
            base=_checked(items, base),
            chance=np.array([item.chance for item in items], dtype=np.float64),
        ),
        same_text=float(np.mean([mine.text == plain.text for mine, plain in zip(model, base, strict=True)])),
        items=len(items),
    )


def _checked(
    items: Sequence[GenerationItem], answers: Sequence[Answer]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array([item.score(answer.text) for item, answer in zip(items, answers, strict=True)], dtype=np.float64)
