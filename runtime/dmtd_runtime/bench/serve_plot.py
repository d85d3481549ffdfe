"""Latency over load as a picture. Loads matplotlib when called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmtd_errors.words import counted
from dmtd_runtime.bench.serve_report import LoadReport, ModeFigures
from dmtd_runtime.errors import RequestError

STYLES = {"plain": ("tab:gray", "--"), "dmtd": ("tab:blue", "-")}
MARKERS = "osv^D"


def check_rates(rates: Sequence[float], picture: Path) -> None:
    """Raise RequestError where there is nothing to draw, or no such kind of picture."""
    if len({rate for rate in rates if math.isfinite(rate)}) < 2:
        raise RequestError(
            "expected several request rates to draw latency over, such as --request-rate 1,2,4", param="plot"
        )
    if picture.suffix not in (".png", ".svg"):
        raise RequestError(f"got {picture.name}, expected a name that ends in .png or .svg", param="plot")


def draw_latency(loads: Sequence[LoadReport], picture: Path) -> None:
    """Draw time to first token and between tokens over the request rate, as the file's ending says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    first, between = figure.subplots(1, 2)
    finite = [load for load in loads if load.request_rate is not None and math.isfinite(load.request_rate)]
    for index, slots in enumerate(sorted({load.slots for load in finite})):
        of_slots = [load for load in finite if load.slots == slots]
        marker = MARKERS[index % len(MARKERS)]
        for mode, name in (("plain", "plain"), ("dmtd", "DMTD")):
            figures: list[ModeFigures] = [getattr(load, mode) for load in of_slots]
            rates = [load.request_rate for load in of_slots]
            colour, line = STYLES[mode]
            style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}
            first.plot(rates, [f.ttft_ms.p50 for f in figures], label=f"{name}, {counted(slots, 'slot')}", **style)
            gaps = [math.nan if f.itl_ms is None else f.itl_ms.p99 for f in figures]
            between.plot(rates, gaps, label=f"{name}, {counted(slots, 'slot')}", **style)
    for axes, title in ((first, "time to first token, median, ms"), (between, "between two tokens, p99, ms")):
        axes.set(title=title, xlabel="requests a second", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    first.legend(frameon=False, fontsize="small")
    figure.savefig(picture, dpi=150)
