"""Tables and figures of the study, from the result files that ``tools/study`` leaves. Reads, fits and draws; measures nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
_PARTS = {"summary": "summary.json", "evaluation": "evaluation/report.json", "bench": "bench.json"}


def write_report(work: Path, output: Path, command: str) -> None:
    """Write results.json, README.md's tables (tables.md) and three figures into ``output``."""
    results = [read_result(path.parent) for path in sorted(work.glob("*/summary.json"))]
    if not results:
        raise SystemExit(f"{work}: no setting is done yet")
    output.mkdir(parents=True, exist_ok=True)
    kept = [{key: value for key, value in result.items() if key != "log"} for result in results]
    fits = {result["name"]: fit_loss(result["log"]) for result in results}
    (output / "results.json").write_text(
        json.dumps({"command": command, "settings": kept, "fits": fits}, indent=1) + "\n", encoding="utf-8"
    )
    (output / "tables.md").write_text(tables(results, fits), encoding="utf-8")
    draw_quality(results, output / "quality_over_speed.png")
    draw_loss(results, fits, output / "loss_over_tokens.png")
    draw_agreement(results, output / "agreement_by_phase.png")


def read_result(directory: Path) -> Result:
    """What is there of one setting; parts that were not measured are None."""
    result: Result = {"name": directory.name}
    for part, name in _PARTS.items():
        file = directory / name
        result[part] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if result["evaluation"] is not None and result["evaluation"].get("fluency"):
        for voice in ("model", "plain"):
            result["evaluation"]["fluency"][voice].pop("texts", None)
    lines = (directory / "training" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    result["log"] = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return result


def fit_loss(log: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Held-out divergence = a + b ln(tokens) by least squares over the last nine tenths; and that at ten times the tokens."""
    points = [(line["eval_tokens"], line["eval_divergence"]) for line in log if "eval_divergence" in line]
    points = [point for point in points if point[0] >= points[-1][0] / 10]
    if len(points) < 3:
        return None
    x, y = [math.log(tokens) for tokens, _ in points], [loss for _, loss in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    last = points[-1]
    return {
        "slope_per_efold": slope,
        "intercept": mean_y - slope * mean_x,
        "tokens": last[0],
        "divergence": last[1],
        "at_ten_times": max(0.0, mean_y + slope * (math.log(10 * last[0]) - mean_x)),
    }


def tables(results: Sequence[Result], fits: Mapping[str, Mapping[str, float] | None]) -> str:
    """Two tables: quality against speed, and what was spent."""
    rows = [
        "| setting | tau | perplexity ratio (95%) | agreement by phase | run length | retention (95%) | speed ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    spent = [
        "| setting | tokens | time | tokens/s | divergence at the end | at ten times the tokens |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        summary, found, fit = result["summary"], result["evaluation"], fits[result["name"]]
        rows.append(f"| {result['name']} | {summary['split']['cycle_length']} | {_quality(found)} | {_speed(result)} |")
        end = f"{fit['divergence']:.3f} | {fit['at_ten_times']:.3f}" if fit else "- | -"
        spent.append(
            f"| {result['name']} | {summary['tokens'] / 1e6:.2f} M | {summary['seconds'] / 60:.0f} min | "
            f"{summary['tokens_per_s']:.0f} | {end} |"
        )
    return "\n".join([*rows, "", *spent, ""])


def _quality(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "- | - | - | -"
    phases = [value for name, value in found["agreement_by_phase"].items() if name.isdigit()]
    ratio, interval = found["perplexity"]["ratio"], found["ci95"]["perplexity_ratio"]["overall"]
    runs = " / ".join(f"{kind} {value['mean']:.1f}" for kind, value in found["run_lengths"].items())
    kept = found["retention"]
    retained = "-"
    if kept and kept["value"] is not None:
        span = found["ci95"]["retention"]
        retained = (
            f"{kept['value']:.1%}"
            + (f" ({span[0]:.0%}-{span[1]:.0%})" if span else "")
            + (", wide" if kept["wide"] else "")
        )
    spread = f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""
    return f"{ratio:.2f}{spread} | {' / '.join(f'{value:.0%}' for value in phases)} | {runs} | {retained}"


def _speed(result: Result) -> str:
    speed = speed_ratio(result)
    return "-" if speed is None else f"{speed:.2f}"


def speed_ratio(result: Result) -> float | None:
    """DMTD over plain decoding of the exported bundle, at batch 1."""
    bench = result["bench"]
    return None if bench is None else float(bench["ratio"])


def draw_quality(results: Sequence[Result], picture: Path) -> None:
    """Perplexity ratio over speed ratio, one curve for each D."""
    figure, axis = _figure()
    by_late: dict[int, list[tuple[float, float, int]]] = {}
    for result in results:
        speed, found, split = speed_ratio(result), result["evaluation"], result["summary"]["split"]
        if speed is not None and found is not None:
            point = (speed, found["perplexity"]["ratio"], split["cycle_length"])
            by_late.setdefault(split["decoding_layers"], []).append(point)
    for late, points in sorted(by_late.items()):
        points.sort()
        axis.plot([p[0] for p in points], [p[1] for p in points], "o-", label=f"D {late}")
        for speed, ratio, tau in points:
            axis.annotate(f"tau {tau}", (speed, ratio), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axis.axhline(1, color="gray", lw=0.7)
    axis.set(xlabel="speed over plain decoding", ylabel="perplexity over the plain model's", title="quality over speed")
    if by_late:
        axis.legend()
    figure.savefig(picture, dpi=120)


def draw_loss(results: Sequence[Result], fits: Mapping[str, Mapping[str, float] | None], picture: Path) -> None:
    """Held-out divergence over tokens, with the fit drawn on to ten times the data."""
    figure, axis = _figure()
    for result in results:
        points = [(line["eval_tokens"], line["eval_divergence"]) for line in result["log"] if "eval_divergence" in line]
        if not points:
            continue
        [line] = axis.plot(*zip(*points, strict=True), "o-", ms=3, label=result["name"])
        fit = fits[result["name"]]
        if fit is not None:
            ends = [points[-1][0] / 10, points[-1][0] * 10]
            values = [fit["intercept"] + fit["slope_per_efold"] * math.log(tokens) for tokens in ends]
            axis.plot(ends, values, ":", color=line.get_color())
    axis.set(
        xscale="log",
        xlabel="tokens",
        ylabel="divergence from the plain model (nats)",
        title="loss over tokens, held out",
    )
    axis.legend(fontsize="small")
    figure.savefig(picture, dpi=120)


def draw_agreement(results: Sequence[Result], picture: Path) -> None:
    """Top-1 agreement with the plain model at each place in the cycle."""
    figure, axis = _figure()
    for result in results:
        found = result["evaluation"]
        if found is not None:
            phases = [(int(name), value) for name, value in found["agreement_by_phase"].items() if name.isdigit()]
            axis.plot(*zip(*phases, strict=True), "o-", label=result["name"])
    axis.set(xlabel="place in the cycle (0: head)", ylabel="top-1 agreement", ylim=(0, 1), title="agreement by phase")
    axis.set_xticks(range(max((r["summary"]["split"]["cycle_length"] for r in results), default=1)))
    axis.legend(fontsize="small")
    figure.savefig(picture, dpi=120)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.subplots()
