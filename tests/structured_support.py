"""Answers of a form out of a random model: what is asked of it, and whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime_support import random_prompt

from dmtd_runtime import LLM, SamplingParams, StructuredOutputs


def wild(seed: int = 1, *, temperature: float = 2.0, max_tokens: int = 900, **form: Any) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputs(**form)
    )


def texts(llm: LLM, params: Sequence[SamplingParams]) -> list[str]:
    """Answers that are complete."""
    outputs = [output.outputs[0] for output in llm.generate([random_prompt(i, 4) for i in range(len(params))], params)]
    assert [output.finish_reason for output in outputs] == ["stop"] * len(params)
    return [output.text for output in outputs]
