"""Multiple choice with a scorer whose log-probabilities are known."""

from __future__ import annotations

import pytest
from evaluate_support import FakeScorer, cycle

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.multiple_choice import measure_choices, split_prompt
from dmtd_export.evaluate.scorer import ScoreRequest
from dmtd_models.data.items import MultipleChoiceItem


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def item(choices: tuple[str, ...], answer: int, prompt: str = "abc") -> MultipleChoiceItem:
    return MultipleChoiceItem(task="t", item_id="0", prompt=prompt, choices=choices, answer=answer)


def by_letter(request: ScoreRequest, position: int) -> tuple[float, int]:
    """g: -1 for the model and -3 plain; b: the reverse."""
    good = "g" if not request.plain else "b"
    target = request.token_ids[position + 1] if position + 1 < len(request.token_ids) else 0
    return (-1.0 if chr(target) == good else -3.0), 0


def test_sum_and_normalised_sum() -> None:
    """Model: gggg -4 (-1 a byte), bbbb -12, gggggggbb -13 (-1.44 a byte)."""
    scorer = FakeScorer(by_letter)
    items = [item(("bbbb", "gggg"), 1), item(("gggg", "bbbb"), 1), item(("bbbb", "gggggggbb"), 1)]
    found = measure_choices(scorer, scorer, items, encode)
    assert found.acc.model.tolist() == [1, 0, 0]  # -12 beats -13
    assert found.acc_norm.model.tolist() == [1, 0, 1]
    assert found.acc.base.tolist() == [0, 1, 0]  # plain: bbbb -4
    assert found.acc_norm.base.tolist() == [0, 1, 0]
    assert found.acc.chance.tolist() == [0.5] * 3
    assert all(r.prompt_len == 3 and r.first_row == 2 for r in scorer.requests)


def test_share_of_scored_tokens_by_phase() -> None:
    scorer = FakeScorer(by_letter, cycle(3))
    found = measure_choices(scorer, scorer, [item(("gggg", "bbbbbb"), 0)], encode)
    # gggg: predicted by the last prompt row and phases 0, 1, 2; bbbbbb: the same and 0, 1.
    assert found.phase_share == {"prompt": 0.2, "0": 0.3, "1": 0.3, "2": 0.2}
    absolute = FakeScorer(by_letter, cycle(3, "absolute", "cyclical"))
    found = measure_choices(absolute, absolute, [item(("gggg", "bbbb"), 0)], encode)
    # Rows 2, 3, 4, 5 of both.
    assert found.phase_share == {"0": 0.25, "1": 0.25, "2": 0.5}


def test_short_continuations_and_long_items_are_skipped_and_counted() -> None:
    scorer = FakeScorer(by_letter)
    items = [item(("gggg", "bbb"), 0), item(("gggg", "b" * 300), 0), item(("gggg", "bbbb"), 0)]
    found = measure_choices(scorer, scorer, items, encode)
    assert (found.items, found.skipped) == (1, 2)
    with pytest.raises(EvaluateError, match="none of 2 items has continuations of 4 tokens"):
        measure_choices(scorer, scorer, items[:2], encode)


def test_a_token_across_the_border_belongs_to_the_continuation() -> None:
    assert split_prompt([1, 2, 3], [1, 2, 3, 4]) == 3
    assert split_prompt([1, 2, 3], [1, 2, 34, 5]) == 2
    assert split_prompt([1, 2, 3], [1, 2]) == 2


def test_an_answer_that_is_no_choice() -> None:
    scorer = FakeScorer(by_letter)
    with pytest.raises(EvaluateError, match="answer 2 of 2 choices"):
        measure_choices(scorer, scorer, [item(("gggg", "bbbb"), 2)], encode)
