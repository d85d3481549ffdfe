"""Numbered prompts for ``answers``: questions the model asks itself, everyday patterns, facts, procedural exercises.

The patterns and word lists were written for this project. Exercises come from the package reasoning-gym (Apache-2.0)
with training seeds; the package is imported only where they have a share.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType

import numpy as np

from dmtd_models.finetune.shards import AnswersError
from study.answers import Prompt, PromptSource
from study.words import FACT_PATTERNS, PATTERNS, WORDS

_AN = re.compile(r"\b([Aa]) (?=[aeiou])")
# Evaluation uses seeds from a million on.
_GYM_SEEDS = 1_000_000
GYM_TASKS = (
    "chain_sum", "basic_arithmetic", "products", "gcd", "lcm", "simple_equations", "fraction_simplification",
    "letter_counting", "number_sorting", "word_sorting", "spell_backward", "leg_counting", "calendar_arithmetic",
    "time_intervals", "family_relationships", "syllogism", "count_primes", "decimal_chain_sum", "base_conversion",
    "prime_factorization", "number_filtering", "gsm_symbolic",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Shares of the kinds; they are taken relative to their sum. ``fact`` questions have short answers, so their share of the
    tokens is smaller: where a late step must name what the model knows, not go on with a phrase, it learns from these.
    """

    self_asked: float = 0.50
    template: float = 0.22
    fact: float = 0.20
    gym: float = 0.08


def mixed_prompts(*, seed: int, mix: Mix) -> PromptSource:
    """A source that gives prompt ``index`` from (seed, index) alone.

    Raises:
        AnswersError: exercises are wanted and their package is missing.
    """
    if mix.gym > 0:
        _gym()
    shares = np.array([mix.self_asked, mix.template, mix.fact, mix.gym])
    bounds = np.cumsum(shares / shares.sum())

    def prompt(index: int) -> Prompt:
        rng = np.random.default_rng([seed, index, 1])
        place = rng.random()
        if place < bounds[0]:
            return Prompt(kind="self", question=None)
        if place < bounds[1]:
            return Prompt(kind="template", question=fill_pattern(rng))
        if place < bounds[2]:
            return Prompt(kind="fact", question=fill_pattern(rng, FACT_PATTERNS))
        return Prompt(kind="gym", question=exercise(rng))

    return prompt


def fill_pattern(rng: np.random.Generator, patterns: Sequence[str] = PATTERNS) -> str:
    """One question: a pattern and words for its places."""
    pattern = patterns[int(rng.integers(len(patterns)))]
    words: dict[str, str] = {name: values[int(rng.integers(len(values)))] for name, values in WORDS.items()}
    words |= {name: str(int(rng.integers(low, high))) for name, (low, high) in _NUMBERS.items()}
    return _AN.sub(r"\1n ", pattern.format_map(words))


def exercise(rng: np.random.Generator) -> str:
    """One exercise of reasoning-gym, of a training seed."""
    task = GYM_TASKS[int(rng.integers(len(GYM_TASKS)))]
    made = _gym().create_dataset(task, seed=int(rng.integers(_GYM_SEEDS)), size=1)
    return str(made[0]["question"]).strip()


def _gym() -> ModuleType:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise AnswersError(
            f"exercises: got {error}, expected the package reasoning-gym; "
            "pip install reasoning-gym==0.1.25, or give exercises no share"
        ) from error


_NUMBERS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"small": (2, 10), "number": (2, 60), "other": (2, 60), "large": (100, 1000)}
)
