"""Tables and figures of the study, from the result files that ``tools/study`` leaves. Reads, fits and draws; measures nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]
_PARTS = {"summary": "summary.json", "evaluation": "evaluation/report.json", "bench": "bench.json"}


def write_report(work: Path, output: Path, command: str) -> None:
    """Write results.json, README.md's tables (tables.md) and three figures into ``output``."""
    results = [read_result(path.parent) for path in sorted(work.glob("*/summary.json"))]
    if not results:
        raise SystemExit(f"{work}: no setting is done yet")
    output.mkdir(parents=True, exist_ok=True)
    kept = [{key: value for key, value in result.items() if key != "log"} for result in results]
    fits = {result["name"]: fit_loss(result["log"], _decay(result)) for result in results}
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


def _decay(result: Result) -> float:
    options = result["summary"]["options"]
    return float(options["decay"]) if options["schedule"] == "warmup_stable_decay" else 0.0


def fit_loss(log: Sequence[Mapping[str, Any]], decay: float) -> dict[str, float] | None:
    """Held-out divergence = a + b ln(tokens), by least squares over what lies before the learning rate falls (the last share
    ``decay`` of the run) and behind the first tenth. Ten times the tokens are told from the run's end with the same slope.
    """
    points = [(line["eval_tokens"], line["eval_divergence"]) for line in log if "eval_divergence" in line]
    if not points:
        return None
    last_tokens, end = points[-1]
    steady = [point for point in points if last_tokens / 10 <= point[0] <= (1 - decay) * last_tokens]
    if len(steady) < 3:
        return None
    slope, intercept = np.polyfit(np.log([tokens for tokens, _ in steady]), [value for _, value in steady], 1).tolist()
    return {
        "slope_per_efold": slope,
        "intercept": intercept,
        "until": steady[-1][0],
        "tokens": last_tokens,
        "divergence": end,
        "at_ten_times": max(0.0, end + slope * math.log(10)),
    }


def tables(results: Sequence[Result], fits: Mapping[str, Mapping[str, float] | None]) -> str:
    """Quality against speed, what was spent, and the same tokens at every place of a cycle."""
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
    return "\n".join([*rows, "", *spent, "", *_offset_rows(results)])


def _offset_rows(results: Sequence[Result]) -> list[str]:
    measured = [result for result in results if result["evaluation"] and result["evaluation"].get("offsets")]
    if not measured:
        return []
    rows = ["| setting | the same tokens | perplexity ratio (95%) | agreement (95%) |", "|---|---|---|---|"]
    for result in measured:
        offsets = result["evaluation"]["offsets"]
        lines = [(f"first head {name} later", value) for name, value in offsets["by_offset"].items()]
        lines += [
            ("at a head" if name == "0" else f"late {name}", value) for name, value in offsets["by_phase"].items()
        ]
        for words, value in lines:
            low, high = value["ratio_ci95"]
            least, most = value["agreement_ci95"]
            rows.append(
                f"| {result['name']} | {words} | {value['ratio']:.3f} ({low:.3f}-{high:.3f}) | "
                f"{value['agreement']:.1%} ({least:.1%}-{most:.1%}) |"
            )
    return [*rows, ""]


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
    """Perplexity ratio over speed ratio, one curve for each split."""
    figure, axis = _figure()
    by_split: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    for result in results:
        speed, found, split = speed_ratio(result), result["evaluation"], result["summary"]["split"]
        if speed is not None and found is not None:
            point = (speed, found["perplexity"]["ratio"], split["cycle_length"])
            by_split.setdefault((split["encoding_layers"], split["decoding_layers"]), []).append(point)
    for (early, late), points in sorted(by_split.items()):
        points.sort()
        axis.plot([p[0] for p in points], [p[1] for p in points], "o-", label=f"E {early} D {late}")
        for speed, ratio, tau in points:
            axis.annotate(f"tau {tau}", (speed, ratio), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axis.axhline(1, color="gray", lw=0.7)
    axis.set(xlabel="speed over plain decoding", ylabel="perplexity over the plain model's", title="quality over speed")
    if by_split:
        axis.legend()
    figure.savefig(picture, dpi=120)


def draw_loss(results: Sequence[Result], fits: Mapping[str, Mapping[str, float] | None], picture: Path) -> None:
    """Held-out divergence over tokens; dotted, the fit before the learning rate falls, and its slope from the end on."""
    figure, axis = _figure()
    for result in results:
        points = [(line["eval_tokens"], line["eval_divergence"]) for line in result["log"] if "eval_divergence" in line]
        if not points:
            continue
        [line] = axis.plot(*zip(*points, strict=True), "o-", ms=3, label=result["name"])
        fit = fits[result["name"]]
        if fit is not None:
            steady = [fit["tokens"] / 10, fit["until"]]
            values = [fit["intercept"] + fit["slope_per_efold"] * math.log(tokens) for tokens in steady]
            axis.plot(steady, values, ":", color=line.get_color())
            axis.plot(
                [fit["tokens"], 10 * fit["tokens"]],
                [fit["divergence"], fit["at_ten_times"]],
                ":",
                color=line.get_color(),
            )
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
