"""Multiple choice under the DMTD pattern: the answer is the continuation to which the model gives the highest probability.

The prompt is the item's prompt, so where cycles count from its end the continuation's tokens run through all phases. Only
items whose continuations all have MIN_TOKENS tokens are scored: shorter ones hardly leave the plain prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.scorer import Scorer, ScoreRequest, TokenScores, phase_name, phases, score_pair
from dmtd_export.evaluate.statistics import Array, PairedScores
from dmtd_models.data.items import MultipleChoiceItem

MIN_TOKENS = 4
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceResult:
    """``acc`` by the sum of log-probabilities, ``acc_norm`` by that sum over the continuation's UTF-8 bytes.

    ``phase_share``: of the scored tokens, the share that each phase's rows predict. ``skipped``: items with a continuation
    that is too short, or that do not fit the model.
    """

    acc: PairedScores
    acc_norm: PairedScores
    items: int
    skipped: int
    phase_share: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    request: ScoreRequest
    num_bytes: int


def split_prompt(prompt_ids: Sequence[int], whole_ids: Sequence[int]) -> int:
    """Tokens of the whole that are the prompt's own: a token that spans the border belongs to the continuation."""
    return next(
        (i for i, (a, b) in enumerate(zip(prompt_ids, whole_ids, strict=False)) if a != b),
        min(len(prompt_ids), len(whole_ids)),
    )


def measure_choices(
    model: Scorer,
    base: Scorer,
    items: Sequence[MultipleChoiceItem],
    encode: Encode,
    *,
    on_done: Callable[[int], None] = lambda count: None,
) -> ChoiceResult:
    """Score every choice of every item with the model under its pattern and with the plain base.

    Raises:
        EvaluateError: no item can be scored, or an item's answer is none of its choices.
    """
    max_len = min(model.max_len, base.max_len)
    rows: list[tuple[float, float, float, float, float]] = []  # model, base: right by sum, by normalised sum; chance
    seen: Counter[int] = Counter()
    for item in items:
        choices = _choices(item, encode, max_len)
        if choices is not None:
            pairs = score_pair(model, base, [choice.request for choice in choices])
            right = [_right(item, choices, scores) for scores in pairs]
            rows.append((*right[0], *right[1], 1 / len(choices)))
            for choice in choices:
                at = phases(
                    model.cycle, prompt_len=choice.request.prompt_len, num_rows=len(choice.request.token_ids) - 1
                )
                seen.update(at[choice.request.first_row :].tolist())
        on_done(1)
    if not rows:
        raise EvaluateError(
            f"task {items[0].task if items else ''}: none of {len(items)} items has continuations of {MIN_TOKENS} tokens "
            f"or more that fit into {max_len} tokens; choose another task"
        )
    table = np.array(rows)
    name, total = items[0].task, seen.total()
    return ChoiceResult(
        acc=PairedScores(name=name, model=table[:, 0], base=table[:, 2], chance=table[:, 4]),
        acc_norm=PairedScores(name=name, model=table[:, 1], base=table[:, 3], chance=table[:, 4]),
        items=len(rows),
        skipped=len(items) - len(rows),
        phase_share={phase_name(phase): seen[phase] / total for phase in sorted(seen)},
    )


def _choices(item: MultipleChoiceItem, encode: Encode, max_len: int) -> list[_Choice] | None:
    """The item's continuations as sequences; None if one of them is too short or too long."""
    if not 0 <= item.answer < len(item.choices):
        raise EvaluateError(f"{item.task} {item.item_id}: answer {item.answer} of {len(item.choices)} choices")
    prompt_ids = encode(item.prompt)
    made = []
    for text in item.choices:
        whole = encode(item.prompt + text)
        prompt_len = split_prompt(prompt_ids, whole)
        if prompt_len < 1 or len(whole) - prompt_len < MIN_TOKENS or len(whole) > max_len:
            return None
        request = ScoreRequest(token_ids=tuple(whole), prompt_len=prompt_len, plain=False, first_row=prompt_len - 1)
        made.append(_Choice(request=request, num_bytes=len(text.encode())))
    return made


def _right(item: MultipleChoiceItem, choices: Sequence[_Choice], scores: Sequence[TokenScores]) -> tuple[float, float]:
    """1 or 0 by the sum, and by the normalised sum."""
    sums: Array = np.array([float(s.target_logprobs.sum()) for s in scores])
    lengths = np.array([max(1, choice.num_bytes) for choice in choices])
    return float(sums.argmax() == item.answer), float((sums / lengths).argmax() == item.answer)
