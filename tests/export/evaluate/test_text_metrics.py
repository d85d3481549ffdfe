"""Perplexity, agreement and run lengths of scorers whose every number is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from evaluate_support import FakeScorer, cycle

from dmtd_export.evaluate.conventions import _worse
from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.offsets import measure_offsets
from dmtd_export.evaluate.run_lengths import PREFIX_LENS, draw_prefixes, measure_run_lengths
from dmtd_export.evaluate.scorer import ScoreRequest
from dmtd_export.evaluate.statistics import Bootstrap
from dmtd_export.evaluate.text_metrics import measure_text
from dmtd_export.evaluate.texts import TextWindow
from dmtd_export.evaluate.weight_formats import measure_format_cost

BOOTSTRAP = Bootstrap(resamples=100)


def windows(count: int, length: int = 26, documents: int = 20, context: int = 5) -> list[TextWindow]:
    return [
        TextWindow(source="s", text_id=str(i % documents), token_ids=tuple(range(length)), context_len=context)
        for i in range(count)
    ]


@pytest.mark.parametrize("origin", ["prompt", "absolute"])
def test_perplexity_and_agreement_by_phase(origin: str) -> None:
    """The model's perplexity is 2, 4 and 8 at phases 0, 1, 2, and it agrees with the base at phase 0 only; the base's is 2."""
    context = 5

    def row(request: ScoreRequest, position: int) -> tuple[float, int]:
        if request.plain:
            return -math.log(2), 7
        phase = (position - (request.prompt_len if origin == "prompt" else 0)) % 3
        return -math.log(2) * (1 + phase), 7 if phase == 0 else 8

    scorer = FakeScorer(row, cycle(3, origin, "thinking" if origin == "prompt" else "cyclical"))
    found = measure_text(scorer, scorer, windows(12, 26, context=context), bootstrap=BOOTSTRAP)
    # Rows 5 .. 24 of every window have a target: 20 rows.
    assert found.overall.tokens == 12 * 20
    counts = [
        sum((p - (context if origin == "prompt" else 0)) % 3 == phase for p in range(5, 25)) for phase in range(3)
    ]
    for phase, perplexity, agreement in ((0, 2, 1), (1, 4, 0), (2, 8, 0)):
        result = found.by_phase[str(phase)]
        assert result.tokens == 12 * counts[phase]
        assert result.perplexity.value == pytest.approx(perplexity)
        assert result.base_perplexity.value == pytest.approx(2)
        assert result.ratio.value == pytest.approx(perplexity / 2)
        assert result.agreement.value == agreement
    mean_exponent = (counts[0] * 1 + counts[1] * 2 + counts[2] * 3) / 20
    assert found.overall.perplexity.value == pytest.approx(2**mean_exponent)
    assert found.overall.agreement.value == pytest.approx(counts[0] / 20)
    assert all(request.prompt_len == context == request.first_row for request in scorer.requests)


def test_what_formats_cost_is_measured_with_both_sides_alike() -> None:
    """The base's perplexity is 2 plain and 4 in cycles, the model's twice that at late steps and the same elsewhere."""

    def row(request: ScoreRequest, position: int, late: int) -> tuple[float, int]:
        if request.plain:
            return -math.log(2), 7
        at_late_step = (position - request.prompt_len) % 3 > 0
        return -math.log(2) * (2 + (late if at_late_step else 0)), 7 + (late if at_late_step else 0)

    model, base = (FakeScorer(lambda request, position, late=late: row(request, position, late)) for late in (1, 0))
    found = measure_format_cost(model, base, windows(12, 26), bootstrap=BOOTSTRAP)
    assert found.plain.overall.ratio.value == pytest.approx(1)
    assert found.plain.overall.base_perplexity.value == pytest.approx(2)
    for phase, ratio in (("0", 1), ("1", 2), ("2", 2)):
        result = found.cycles.by_phase[phase]
        assert result.ratio.value == pytest.approx(ratio)
        assert result.base_perplexity.value == pytest.approx(4)
        assert result.agreement.value == (ratio == 1)


def test_documents_are_the_units_where_there_are_enough() -> None:
    scorer = FakeScorer(lambda request, position: (-1.0, 0))
    assert measure_text(scorer, scorer, windows(24, documents=12), bootstrap=BOOTSTRAP).unit == "document"
    few = measure_text(scorer, scorer, windows(24, documents=3), bootstrap=BOOTSTRAP)
    assert (few.unit, few.documents, few.windows) == ("window", 3, 24)


def test_windows_of_one_document_are_not_independent() -> None:
    """Twelve documents of eight equal windows each: the interval is that of twelve units, not of 96."""

    def row(request: ScoreRequest, position: int) -> tuple[float, int]:
        return (-1.0 if request.plain else -1.0 - request.token_ids[0]), 0

    scorer = FakeScorer(row)
    repeated = [
        TextWindow(source="s", text_id=str(i % 12), token_ids=(i % 12, *range(1, 12)), context_len=2)
        for i in range(8 * 12)
    ]
    many = measure_text(scorer, scorer, repeated, bootstrap=BOOTSTRAP)
    once = measure_text(scorer, scorer, repeated[:12], bootstrap=BOOTSTRAP)
    assert many.overall.ratio.interval() == pytest.approx(once.overall.ratio.interval())
    assert many.by_source["s"].ratio.interval() == pytest.approx(many.overall.ratio.interval())


def test_run_lengths_end_at_the_first_difference() -> None:
    """The base goes on with 500; a prefix that begins with k is followed for k tokens."""

    def row(request: ScoreRequest, position: int) -> tuple[float, int]:
        written = position + 1 - request.prompt_len
        return 0.0, 500 if request.plain or written < request.token_ids[0] else 501

    model, base = FakeScorer(row), FakeScorer(row)
    prefixes = [(0, 9), (1, 9), (1, 9), (3, 9, 9), (9, 9), (4, 9)]
    found = measure_run_lengths(model, base, prefixes, most=4, bootstrap=BOOTSTRAP)
    assert found.counts == (1, 2, 0, 1, 2)  # 9 is cut off at 4
    assert found.mean.value == pytest.approx((0 + 1 + 1 + 3 + 4 + 4) / 6)
    assert found.prefixes == 6
    longest = max(model.requests, key=lambda r: len(r.token_ids))
    assert longest.token_ids[longest.prompt_len :] == (500,) * 3  # the last choice is not fed
    assert all(r.plain for r in base.requests) and not any(r.plain for r in model.requests)
    # Nothing behind a difference is computed: k + 1 steps for a run of k, and none behind the cut.
    assert len(model.requests) == 1 + 2 + 2 + 4 + 4 + 4


def test_conventions_within_noise_are_as_good() -> None:
    """Losses on the same rows: the third is worse on every one, the second on as many as it is better."""
    better = np.array([[10.0 + i, 8.0, 10.0, 5.0] for i in range(20)])
    level = better + np.array([[0.1 * (-1) ** i, 0, 0, 0] for i in range(20)])
    assert not _worse(level, better, BOOTSTRAP)
    assert _worse(better + np.array([0.5, 0, 0, 0]) + 0.1 * (level - better), better, BOOTSTRAP)


def test_lengths_of_prefixes_are_drawn_evenly_whatever_the_context() -> None:
    """Under an absolute origin a length decides the first phase: none may come more often than others."""
    lengths = [len(prefix) for prefix in draw_prefixes(windows(5, 100, context=32), 4900, seed=0)]
    counts = [lengths.count(length) for length in range(PREFIX_LENS[0], PREFIX_LENS[1] + 1)]
    assert sum(counts) == 4900 and min(counts) > 60 and max(counts) < 140  # 100 each, four standard errors either way


def test_the_prefix_of_a_chat_holds_its_prompt() -> None:
    chats = [replace(window, is_chat=True) for window in windows(5, 100, context=60)]
    assert {len(prefix) for prefix in draw_prefixes(chats, 200, seed=0)} == set(range(60, 65))


def test_prefixes_vary_in_length_and_serve_again() -> None:
    made = draw_prefixes(windows(5, 100), 40, seed=0)
    assert len(made) == 40
    assert {len(p) for p in made} <= set(range(PREFIX_LENS[0], PREFIX_LENS[1] + 1))
    assert len({len(p) % 4 for p in made}) == 4
    assert made == draw_prefixes(windows(5, 100), 40, seed=0)
    assert made != draw_prefixes(windows(5, 100), 40, seed=1)


def test_every_token_stands_once_at_every_place() -> None:
    """The model loses its phase in bits, and one more where the head stands on an odd position; the base always loses one."""

    def row(request: ScoreRequest, position: int) -> tuple[float, int]:
        if request.plain:
            return -math.log(2), 7
        phase = (position - request.prompt_len) % 2
        return -math.log(2) * (1 + phase + request.prompt_len % 2), 7 if phase == 0 else 8

    scorer = FakeScorer(row, cycle(2, "prompt", "thinking"))
    found = measure_offsets(scorer, scorer, windows(12, 26, context=4), bootstrap=BOOTSTRAP)
    # Rows 5 .. 24 have a target and a cycle at both offsets: 20 of them, 10 at each place.
    assert {name: result.tokens for name, result in found.by_offset.items()} == {"0": 240, "1": 240}
    assert {name: result.tokens for name, result in found.by_phase.items()} == {"0": 240, "1": 240}
    assert [found.by_offset[k].ratio.value for k in "01"] == pytest.approx([2**0.5, 2**1.5])
    assert [found.by_phase[p].ratio.value for p in "01"] == pytest.approx([2**0.5, 2**1.5])
    assert [found.by_phase[p].agreement.value for p in "01"] == [1, 0]
    assert [found.by_phase[p].base_perplexity.value for p in "01"] == pytest.approx([2, 2])
    assert found.by_offset["0"].agreement.value == 0.5


def test_heads_of_an_absolute_cycle_stay() -> None:
    scorer = FakeScorer(lambda request, position: (-1.0, 0), cycle(3, "absolute", "cyclical"))
    with pytest.raises(EvaluateError, match=r"offsets: cycles of origin absolute"):
        measure_offsets(scorer, scorer, windows(2), bootstrap=BOOTSTRAP)


def test_text_shorter_than_a_cycle_has_no_offsets() -> None:
    scorer = FakeScorer(lambda request, position: (-1.0, 0), cycle(3, "prompt", "thinking"))
    with pytest.raises(EvaluateError, match="no window of the text has more than a cycle of 3"):
        measure_offsets(scorer, scorer, windows(2, length=8), bootstrap=BOOTSTRAP)
