"""The report as pictures: agreement by phase, perplexity by phase, retention by task. Loads matplotlib when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.evaluate.dial import DialResult
from dmtd_export.evaluate.report import EvaluationReport, scores_of, task_estimates
from dmtd_export.evaluate.statistics import Estimate

MODEL_COLOUR, BASE_COLOUR = "#1f5fa8", "#9aa4b0"
AGREEMENT_FILE, PERPLEXITY_FILE, RETENTION_FILE = "agreement.png", "perplexity.png", "retention.png"
DIAL_FILE = "quality_over_speed.png"


def write_plots(report: EvaluationReport, directory: Path) -> list[Path]:
    """Write the pictures that the report has numbers for; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    if report.text is not None:
        phases = report.text.by_phase
        names = ["head" if name == "0" else name for name in phases]
        agreement = [result.agreement for result in phases.values()]
        path = directory / AGREEMENT_FILE
        written.append(_bars(path, names, [("", agreement)], "place in the cycle", "top-1 agreement with plain", 1.0))
        sides = [
            ("plain", [result.base_perplexity for result in phases.values()]),
            ("DMTD", [result.perplexity for result in phases.values()]),
        ]
        path = directory / PERPLEXITY_FILE
        written.append(_bars(path, names, sides, "place in the cycle", "perplexity of held-out text", None))
    if report.tasks:
        scores = [scores_of(task) for task in report.tasks]
        kept = [task_estimates(s, report.bootstrap)["retention"] for s in scores]
        names = [s.name + ("" if s.above_chance else "\n(plain at chance)") for s in scores]
        path = directory / RETENTION_FILE
        written.append(_bars(path, names, [("", kept)], "", "score / plain score", None, line=1.0))
    if report.dial is not None:
        written.append(_dial(directory / DIAL_FILE, report.dial))
    return written


def _dial(path: Path, found: DialResult) -> Path:
    """Fluency over measured speed, a point for each confidence, plain decoding at 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    points = [(each.speed[0], each.nll, f"{each.min_confidence:g}") for each in found.settings]
    points = [*points, (1.0, found.base_nll, "plain")]
    axes.plot([x for x, _, _ in points[:-1]], [e.value for _, e, _ in points[:-1]], color=MODEL_COLOUR, marker="o")
    axes.plot([1.0], [found.base_nll.value], color=BASE_COLOUR, marker="o", linestyle="none")
    for x, estimate, label in points:
        axes.annotate(label, (x, estimate.value), textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel("speed over plain decoding, one sequence")
    axes.set_ylabel("nats a token under plain")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def _bars(
    path: Path,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[Estimate]]],
    x_label: str,
    y_label: str,
    top: float | None,
    line: float | None = None,
) -> Path:
    """One group of bars a name, with 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 1.2 + 0.9 * len(names) * len(series)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    at, width = np.arange(len(names)), 0.7 / len(series)
    for i, (label, estimates) in enumerate(series):
        values = np.array([e.value for e in estimates])
        bounds = np.array([e.interval() or [e.value, e.value] for e in estimates])
        errors = np.maximum(0, np.abs(bounds.T - values))
        axes.bar(
            at + (i - (len(series) - 1) / 2) * width,
            values,
            width,
            yerr=errors,
            capsize=3,
            label=label,
            color=MODEL_COLOUR if i == len(series) - 1 else BASE_COLOUR,
        )
    axes.set_xticks(at, names)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    if top is not None:
        axes.set_ylim(0, top)
    if line is not None:
        axes.axhline(line, color=BASE_COLOUR, linewidth=1)
    if len(series) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path
