"""Accepted words in answers: as words, in the first statement."""

import pytest

from dmtd_models.data.scoring import first_statement, names_one_of, states_one_of


@pytest.mark.parametrize(
    ("text", "accepted", "expected"),
    [
        ("The capital is Paris.", ["Paris"], 1),
        ("PARIS!", ["paris"], 1),
        ("A Parisian city", ["Paris"], 0),
        ("There are 12.", ["12", "twelve"], 1),
        ("There are (12) months", ["12"], 1),
        ("Twelve.", ["12", "twelve"], 1),
        ("112 or 12.5 or 12,000 or 0.12", ["12"], 0),
        ("H2O", ["H2O"], 1),
        ("H2O2", ["H2O"], 0),
        ("in south america", ["South America"], 1),
        ("", ["a"], 0),
    ],
)
def test_accepted_words(text, accepted, expected):
    assert names_one_of(text, accepted) == expected


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        ("The capital is Paris. Lyon is large.", "The capital is Paris."),
        ("Sure! It is Paris.\nLyon", "Sure! It is Paris."),
        ("1. Paris\n2. Lyon", "1. Paris 2."),
        ("The price is 2.50 dollars", "The price is 2.50 dollars"),
        ("Paris", "Paris"),
        ("", ""),
    ],
)
def test_first_statements(text, statement):
    assert first_statement(text) == statement


def test_rambling_is_no_answer():
    assert states_one_of("We live on Kepler-41B. It is similar to Earth.", ["Earth"]) == 0
    assert states_one_of("We live on Earth, they say", ["Earth"]) == 1
