"""Generation tasks through the real runtime: ``dmtd_runtime.LLM`` over a bundle, greedy, in batches.

The model answers under its cycles, the base in plain mode; each answer is checked by the item's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.statistics import PairedScores
from dmtd_models.data.items import GenerationItem
from dmtd_runtime import LLM, SamplingParams
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.serving.outputs import RequestMetrics

MAX_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRun:
    """Where and how answers are written. ``threads`` None: one for each core."""

    bundle: Path
    plain: bool
    min_confidence: float = 0.0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was asked, as tokens, and what was written; ``token_ids`` ends with the stop token if one was chosen."""

    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """``same_text``: share of the answers that equal the base's word for word."""

    scores: PairedScores
    same_text: float
    items: int


def write_answers(
    run: GenerationRun, items: Sequence[GenerationItem], on_done: Callable[[int], None] = lambda count: None
) -> list[Answer]:
    """The greedy answer to every wording of every item, in order.

    Raises:
        EvaluateError: the bundle has no chat template.
        DmtdError: what the runtime refuses.
    """
    slots = max(graph.slots for graph in load_manifest(run.bundle).graphs)
    asked = [(messages, item.max_new_tokens) for item in items for messages in item.wordings]
    batch = min(MAX_BATCH, len(asked), slots)
    with LLM(run.bundle, device=run.device, threads=run.threads, plain=run.plain, max_num_seqs=batch) as llm:
        if not llm.has_chat_template or llm.tokenizer is None:
            raise EvaluateError(
                f"{run.bundle}: generation tasks need a tokenizer and a chat template; add them to the checkpoint"
            )
        answers: list[Answer] = []
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            prompts = [llm.tokenizer.encode(llm.render_chat(m), add_special_tokens=False) for m, _ in part]
            params = [SamplingParams(temperature=0, max_tokens=n, min_confidence=run.min_confidence) for _, n in part]
            for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
                [written] = output.outputs
                answers.append(
                    Answer(
                        text=written.text,
                        prompt_ids=tuple(prompt),
                        token_ids=tuple(written.token_ids),
                        metrics=output.metrics,
                    )
                )
            on_done(len(part))
    return answers


def compare_answers(
    items: Sequence[GenerationItem], model: Sequence[Answer], base: Sequence[Answer]
) -> GenerationResult:
    """Check both sides' answers to every wording of the items; an item's score is the mean over its wordings."""
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
    wordings = [item for item in items for _ in item.wordings]
    scores = iter([item.score(answer.text) for item, answer in zip(wordings, answers, strict=True)])
    return np.array([np.mean([next(scores) for _ in item.wordings]) for item in items], dtype=np.float64)
