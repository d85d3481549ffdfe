"""A run's curves as a picture: divergence and agreement by phase, rate of learning, over tokens trained. From the log alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_PHASES = 16  # of a long cycle the first are shown


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl. A line cut short by a kill is passed over, and so is what a restart has done again."""
    lines: list[dict[str, Any]] = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        while lines and lines[-1].get("step", 0) > line.get("step", 0):
            lines.pop()
        if lines and lines[-1].get("step") == line.get("step") and lines[-1].keys() == line.keys():
            lines.pop()
        lines.append(line)
    return lines


def draw_curves(lines: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Draw the log of a run as PNG (or what the file's ending says)."""
    from matplotlib.figure import Figure

    training = [line for line in lines if "divergence_by_phase" in line]
    evaluation = [line for line in lines if "eval_divergence_by_phase" in line]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    _by_phase(axes[0, 0], training, "tokens", "divergence_by_phase", "divergence, training (nats)")
    _by_phase(axes[0, 1], evaluation, "eval_tokens", "eval_divergence_by_phase", "divergence, held out (nats)")
    _by_phase(axes[1, 0], evaluation, "eval_tokens", "eval_agreement_by_phase", "top-1 agreement, held out")
    rate = axes[1, 1]
    rate.plot([line["tokens"] for line in training], [line["learning_rate"] for line in training], color="tab:gray")
    rate.set(xlabel="tokens", ylabel="learning rate")
    speed = rate.twinx()
    speed.plot(
        [line["tokens"] for line in training], [line["tokens_per_s"] for line in training], color="tab:green", lw=0.7
    )
    speed.set(ylabel="tokens/s (green)")
    figure.savefig(picture, dpi=110)


def _by_phase(axis: Any, lines: Sequence[Mapping[str, Any]], x: str, y: str, title: str) -> None:
    phases = min(MOST_PHASES, max((len(line[y]) for line in lines), default=0))
    for phase in range(phases):
        points = [(line[x], line[y][phase]) for line in lines if len(line[y]) > phase and line[y][phase] is not None]
        axis.plot(*zip(*points, strict=True), label="head" if phase == 0 else f"phase {phase}") if points else None
    axis.set(title=title, xlabel="tokens")
    if phases:
        axis.legend(fontsize="small")
