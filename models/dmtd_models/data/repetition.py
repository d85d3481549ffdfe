"""How much a text repeats itself, over token ids: ``distinct_share``, and whether an answer is a loop."""

from __future__ import annotations

from collections.abc import Collection, Sequence

TAIL = 100  # tokens among which a loop is looked for at an answer's end
_SPACES = "\u0120\u2581"  # how byte-level and sentence-piece vocabularies write a leading space


def distinct_share(ids: Sequence[int], n: int = 4) -> float:
    """The share of n-grams that differ from each other; 1.0 for a text shorter than ``n``."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def number_ids(vocabulary: dict[str, int]) -> frozenset[int]:
    """Ids of tokens that are numbers: in a loop they may count up."""
    return frozenset(number for token, number in vocabulary.items() if token.lstrip(_SPACES).isdecimal())


def is_loop(
    answer: Sequence[int], numbers: Collection[int], *, least_distinct: float = 0.5, least_tail: float = 0.3
) -> bool:
    """Whether an answer says the same over and over.

    Args:
        answer: token ids.
        numbers: see ``number_ids``.
        least_distinct: share of 4-grams that differ from each other, below which it is a loop.
        least_tail: the same of its last hundred tokens without numbers, where it has a hundred.
    """
    if distinct_share(answer) < least_distinct:
        return True
    words = [token for token in answer[-TAIL:] if token not in numbers]
    return len(answer) >= TAIL and distinct_share(words) < least_tail
