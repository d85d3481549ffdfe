"""Tables and figures of the study, from the result files that ``tools/study`` leaves. Reads, fits and draws; measures nothing.

DIR/<setting>/ -> collect() -> results.json -> tables() between two marks of README.md, three figures
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_models.finetune.curves import read_log

Result = dict[str, Any]
RESULTS, PAGE = "results.json", "README.md"
_FIRST, _LAST = "<!-- tables: written by tools/study --report -->", "<!-- end of tables -->"
_EVALUATION = ("perplexity", "agreement_by_phase", "run_lengths", "retention", "tasks", "offsets", "ci95", "counts")
_BENCH = ("conditions", "ratio", "ratios", "bound", "plain_tok_per_s", "dmtd_tok_per_s")
SUMMARY = (  # what of the summary of `dmtd finetune` is kept
    "split",
    "options",
    "text",
    "documents",
    "steps",
    "tokens",
    "seconds",
    "tokens_per_s",
    "matmul_peak_flops",
    "matmul_share",
)


def collect(work: Path, order: Sequence[str], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """What is there of every setting; parts that were not measured are None."""
    settings = [_collected(work / name) for name in order if (work / name / "summary.json").is_file()]
    if not settings:
        raise SystemExit(f"{work}: no setting is done yet")
    return {"schema": 1, "conditions": dict(conditions), "settings": settings}


def _collected(directory: Path) -> Result:
    def part(name: str, keys: Sequence[str]) -> Result | None:
        file = directory / name
        if not file.is_file():
            return None
        # Where the work lay is nobody's business: tools/study calls it DIR.
        found = json.loads(file.read_text(encoding="utf-8").replace(str(directory.parent), "DIR"))
        return {key: found[key] for key in keys if key in found}

    kept = ("eval_tokens", "eval_divergence", "eval_divergence_by_phase", "eval_agreement_by_phase")
    return {
        "name": directory.name,
        "summary": part("summary.json", SUMMARY),
        "evaluation": part("evaluation/report.json", _EVALUATION),
        "bench": part("bench.json", _BENCH),
        "held_out": [
            {key: line[key] for key in kept}
            for line in read_log(directory / "training" / "log.jsonl")
            if "eval_divergence" in line
        ],
    }


def write_report(recorded: Mapping[str, Any], output: Path) -> None:
    """Write results.json, the tables of README.md and the figures into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    page = output / PAGE
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Study\n\n{_FIRST}\n{_LAST}\n"
    page.write_text(with_tables(text, recorded), encoding="utf-8")
    results = recorded["settings"]
    fits = {result["name"]: fit_loss(result) for result in results}
    draw_quality(results, output / "quality_over_speed.png")
    draw_loss(results, fits, output / "loss_over_tokens.png")
    draw_agreement(results, output / "agreement_by_phase.png")


def with_tables(page: str, recorded: Mapping[str, Any]) -> str:
    """The page with the tables between its two marks made anew."""
    if page.count(_FIRST) != 1 or page.count(_LAST) != 1:
        raise SystemExit(f"{PAGE}: expected one {_FIRST} and one {_LAST}")
    tables_there = re.compile(f"{re.escape(_FIRST)}.*{re.escape(_LAST)}", re.DOTALL)
    return tables_there.sub(lambda _: f"{_FIRST}\n{tables(recorded)}\n{_LAST}", page)


def fit_loss(result: Result) -> dict[str, float] | None:
    """Held-out divergence = a + b ln(tokens), by least squares over what lies before the learning rate falls and behind the
    first tenth. Ten times the tokens are told from the run's end with the same slope.
    """
    points = [(line["eval_tokens"], line["eval_divergence"]) for line in result["held_out"]]
    if not points:
        return None
    options = result["summary"]["options"]
    decay = float(options["decay"]) if options["schedule"] == "warmup_stable_decay" else 0.0
    last_tokens, end = points[-1]
    steady = [point for point in points if 0.95 * last_tokens / 10 <= point[0] <= (1 - decay) * last_tokens]
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


def tables(recorded: Mapping[str, Any]) -> str:
    """Quality, speed, what was spent, and the same tokens at every place of a cycle."""
    results = recorded["settings"]
    blocks = [
        ["### Splits and cycle lengths", "", *_quality_rows([one for one in results if one["bench"]], speed=True)],
        [
            "### Objective, what is trained, convention (E0 D8, tau 4, fewer tokens)",
            "",
            *_quality_rows([one for one in results if not one["bench"]], speed=False),
        ],
        ["### What was spent", "", *_spent_rows(results)],
        _offset_rows(results),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _quality_rows(results: Sequence[Result], *, speed: bool) -> list[str]:
    """``speed``: of settings whose speed and tasks were measured too."""
    columns = [
        "setting",
        "perplexity ratio (95%)",
        "chats, Austen, code",
        "agreement: head / late",
        "tokens in a row like plain's",
    ]
    if speed:
        columns += ["facts kept", "retention (95%)", "speed", "bytes allow"]
    rows = [" | ".join(columns), "|".join(["---"] * len(columns))]
    for result in results:
        found, bench = result["evaluation"], result["bench"]
        cells = [result["name"], *(_quality(found) if found else ["not measured"])]
        if speed and found:
            cells += [*_tasks(found), f"{bench['ratio']:.2f}", f"{bench['bound']:.2f}"]
        rows.append(" | ".join(cells))
    return [f"| {row} |" for row in rows]


def _quality(found: Mapping[str, Any]) -> list[str]:
    phases = [value for name, value in found["agreement_by_phase"].items() if name.isdigit()]
    ratio, interval = found["perplexity"]["ratio"], found["ci95"]["perplexity_ratio"]["overall"]
    return [
        f"{ratio:.2f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""),
        ", ".join(f"{source['ratio']:.2f}" for source in found["perplexity"]["by_source"].values()),
        f"{phases[0]:.0%} / " + " ".join(f"{value:.0%}" for value in phases[1:]),
        ", ".join(f"{kind} {value['mean']:.1f}" for kind, value in found["run_lengths"].items()),
    ]


def _tasks(found: Mapping[str, Any]) -> list[str]:
    facts, kept, span = found["tasks"]["facts"], found["retention"], found["ci95"]["retention"]
    solved = f"{facts['both_solve']} of {facts['plain_solves']}"
    if not kept or kept["value"] is None or not span:
        return [solved, "-"]
    return [solved, f"{kept['value']:.0%} ({span[0]:.0%}-{span[1]:.0%})" + (", wide" if kept["wide"] else "")]


def _spent_rows(results: Sequence[Result]) -> list[str]:
    rows = [
        "| setting | tokens | minutes | tokens/s, one thread | of the matmul peak | divergence at the end: head / late | "
        "fall for e times the tokens | told for ten times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        summary, fit = result["summary"], fit_loss(result)
        head, *late = (f"{value:.2f}" for value in result["held_out"][-1]["eval_divergence_by_phase"])
        told = f"{-fit['slope_per_efold']:.3f} | {fit['at_ten_times']:.2f}" if fit else "- | -"
        rows.append(
            f"| {result['name']} | {summary['tokens'] / 1e6:.2f} M | {summary['seconds'] / 60:.0f} | "
            f"{summary['tokens_per_s']:.0f} | {summary['matmul_share']:.0%} | {head} / {' '.join(late)} | {told} |"
        )
    return rows


def _offset_rows(results: Sequence[Result]) -> list[str]:
    measured = [result for result in results if result["evaluation"] and result["evaluation"].get("offsets")]
    if not measured:
        return []
    rows = [
        "### The same tokens at every place of a cycle",
        "",
        "| setting | where | perplexity ratio (95%) | agreement (95%) |",
        "|---|---|---|---|",
    ]
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
    return rows


def draw_quality(results: Sequence[Result], picture: Path) -> None:
    """Perplexity ratio over speed ratio, one curve for each split."""
    figure, axis = _figure()
    by_split: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    for result in results:
        bench, found, split = result["bench"], result["evaluation"], result["summary"]["split"]
        if bench is not None and found is not None:
            point = (bench["ratio"], found["perplexity"]["ratio"], split["cycle_length"])
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
        points = [(line["eval_tokens"], line["eval_divergence"]) for line in result["held_out"]]
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
    axis.legend(fontsize="small", loc="upper right", ncols=3)
    figure.savefig(picture, dpi=120)


def _figure() -> tuple[Any, Any]:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    palette: Any = colormaps["tab20"]  # more settings than the ten colours of the default
    axis.set_prop_cycle(color=palette.colors)
    return figure, axis
