"""The prompts for self-written text: every pattern fills, shares are kept, an index always gives the same prompt."""

import re
import string
import sys
from collections import Counter

import numpy as np
import pytest

from dmtd_models.finetune.shards import AnswersError
from study.questions import GYM_TASKS, Mix, exercise, fill_pattern, mixed_prompts
from study.words import PATTERNS, WORDS


def test_every_place_of_a_pattern_has_words():
    names = {name for pattern in PATTERNS for _, name, _, _ in string.Formatter().parse(pattern) if name}
    assert names - WORDS.keys() == {"small", "number", "other", "large"}
    assert WORDS.keys() <= names
    for name, words in WORDS.items():
        assert len(set(words)) == len(words), name


def test_questions_are_varied_and_clean():
    questions = [fill_pattern(np.random.default_rng(seed)) for seed in range(2000)]
    assert len(set(questions)) > 1600
    for question in questions:
        assert not re.search(r"[{}]|  |\ba [aeiou]", question), question


def test_mix():
    prompts = mixed_prompts(seed=1, mix=Mix(self_asked=3, template=1, fact=0, gym=0))
    made = [prompts(index) for index in range(2000)]
    kinds = Counter(prompt.kind for prompt in made)
    assert kinds.keys() == {"self", "template"}
    assert 1400 < kinds["self"] < 1600  # 1500 expected, 19 the standard deviation
    assert all((prompt.question is None) == (prompt.kind == "self") for prompt in made)
    assert made[17] == prompts(17)
    assert made != [
        mixed_prompts(seed=2, mix=Mix(self_asked=3, template=1, fact=0, gym=0))(index) for index in range(2000)
    ]


def test_facts_are_a_kind_of_their_own():
    prompts = mixed_prompts(seed=4, mix=Mix(self_asked=0, template=0, fact=1, gym=0))
    made = [prompts(index) for index in range(1000)]
    assert {prompt.kind for prompt in made} == {"fact"}
    questions = {prompt.question for prompt in made}
    assert len(questions) > 700 and all(len(question) < 120 for question in questions)
    assert not any(question.startswith(("Write", "Tell me a story", "Summarize")) for question in questions)


def test_exercises():
    gym = pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    assert gym and set(GYM_TASKS) <= DATASETS.keys()
    questions = [exercise(np.random.default_rng(seed)) for seed in range(40)]
    assert questions == [exercise(np.random.default_rng(seed)) for seed in range(40)]
    assert all(question and len(question) < 1500 for question in questions)


def test_exercises_without_their_package_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(AnswersError, match="pip install reasoning-gym"):
        mixed_prompts(seed=1, mix=Mix())
    assert mixed_prompts(seed=1, mix=Mix(gym=0))(0).kind in ("self", "template", "fact")
