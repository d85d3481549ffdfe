"""The report for a terminal of 80 columns. Reads the report, measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dmtd_errors.words import counted
from dmtd_export.evaluate.generation import GenerationResult
from dmtd_export.evaluate.lm_eval_run import HarnessResult
from dmtd_export.evaluate.multiple_choice import ChoiceResult
from dmtd_export.evaluate.report import EvaluationReport, scores_of, task_estimates
from dmtd_export.evaluate.statistics import Estimate
from dmtd_export.evaluate.text_metrics import PhaseResult


def render(report: EvaluationReport) -> RenderableType:
    """Headline first: perplexity ratio and agreement by phase; then run lengths, tasks, retention, notes."""
    parts: list[RenderableType] = [_head(report)]
    parts += [
        part
        for shown in (_conventions, _text, _formats, _offsets, _runs, _tasks, _fluency, _dial)
        if (part := shown(report)) is not None
    ]
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    return Group(*parts)


def _head(report: EvaluationReport) -> Table:
    cycle = report.cycle
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    adapter = f", adapter {report.adapter}" if report.adapter else ""
    table.add_row("model", f"{report.model} ({report.model_kind}{adapter})")
    base = f"{report.base} ({report.base_kind})" if report.base else "the model itself"
    table.add_row("base", f"{base}, plain")
    table.add_row(
        "split",
        f"E{cycle.encoding_layers} T{cycle.thinking_layers} D{cycle.decoding_layers}, cycle of {cycle.cycle_length}, "
        f"origin {cycle.cycle_origin}, prompt input {cycle.prompt_input}",
    )
    return table


def _grid(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _text(report: EvaluationReport) -> Table | None:
    text = report.text
    if text is None:
        return None
    table = _grid(
        f"\nheld-out text: {counted(text.overall.tokens, 'token')}, {counted(text.windows, 'window')}, "
        f"{counted(text.documents, 'document')}",
        ("phase", "perplexity", "plain", "ratio", "", "agreement", ""),
    )
    phases = [("all", text.overall), *((_phase(name), result) for name, result in text.by_phase.items())]
    sources = text.by_source.items() if len(text.by_source) > 1 else ()
    for style, rows in (("", phases), ("dim", sources)):
        for name, result in rows:
            table.add_row(
                name,
                number(result.perplexity.value),
                number(result.base_perplexity.value),
                number(result.ratio.value),
                _range(result.ratio),
                percent(result.agreement.value),
                _percents(result.agreement),
                style=style,
            )
    return table


def _phase(name: str) -> str:
    return "0, head" if name == "0" else name


def _offsets(report: EvaluationReport) -> Table | None:
    found = report.offsets
    if found is None:
        return None
    rows = [(f"head {counted(int(name), 'token')} later", result) for name, result in found.by_offset.items()]
    rows += [(f"the same tokens at {_phase(name)}", result) for name, result in found.by_phase.items()]
    return _compared("\nthe first head at every place", rows)


def _formats(report: EvaluationReport) -> Table | None:
    found = report.formats
    if found is None:
        return None
    rows = [("both plain", found.plain.overall), ("both in cycles", found.cycles.overall)]
    rows += [(f"in cycles at {_phase(name)}", result) for name, result in found.cycles.by_phase.items()]
    return _compared("\nformats of weights and caches alone", rows)


def _compared(title: str, rows: Sequence[tuple[str, PhaseResult]]) -> Table:
    table = _grid(title, ("", "tokens", "ratio", "", "agreement", ""))
    for name, result in rows:
        table.add_row(
            name,
            str(result.tokens),
            number(result.ratio.value),
            _range(result.ratio),
            percent(result.agreement.value),
            _percents(result.agreement),
        )
    return table


def _runs(report: EvaluationReport) -> Table | None:
    if not report.runs:
        return None
    table = _grid("\nrun length: tokens that equal plain greedy", ("from", "prefixes", "mean", "", "all"))
    for kind, runs in report.runs.items():
        longest = f"{runs.counts[-1]} reach {runs.most}"
        table.add_row(kind, str(runs.prefixes), number(runs.mean.value), _range(runs.mean), longest)
    return table


def _tasks(report: EvaluationReport) -> Group | None:
    if not report.tasks:
        return None
    table = _grid("\ntasks", ("task", "items", "score", "plain", "chance", "kept", "", "counts"))
    for task in report.tasks:
        scores = scores_of(task)
        found = task_estimates(scores, report.bootstrap)
        table.add_row(
            scores.name,
            str(task.items),
            percent(found["score"].value),
            percent(found["plain_score"].value),
            percent(float(scores.chance.mean())),
            percent(found["retention"].value),
            _percents(found["retention"]),
            "yes" if scores.above_chance else "no: chance",
        )
    lines: list[RenderableType] = [table]
    for task in report.tasks:
        if isinstance(task, ChoiceResult):
            shares = ", ".join(f"{name} {percent(share)}" for name, share in task.phase_share.items())
            lines.append(
                Text(
                    f"{task.acc.name}: {counted(task.skipped, 'item')} skipped; scored tokens by phase: {shares}", "dim"
                )
            )
        elif isinstance(task, HarnessResult):
            lines.append(Text(f"{task.scores.name}: {task.metric}", "dim"))
        elif isinstance(task, GenerationResult):
            known, both = task.scores.solved
            lines.append(
                Text(
                    f"{task.scores.name}: of the {known} items that plain solves {both} are solved; "
                    f"{percent(task.same_text)} of the answers are plain's word for word",
                    "dim",
                )
            )
    kept = report.retention
    if kept is not None and kept.plain is not None and kept.chance_corrected is not None:
        wide = "; the interval is wider than 5 points: too few items to tell" if kept.wide else ""
        lines.append(
            Text(
                f"\nretention {percent(kept.plain.value)} ({_percents(kept.plain)}), chance-corrected "
                f"{percent(kept.chance_corrected.value)} ({_percents(kept.chance_corrected)}), over {len(kept.tasks)} "
                f"task{'s' if len(kept.tasks) > 1 else ''}{wide}"
            )
        )
    else:
        lines.append(Text("\nretention: none, for plain is above chance on no task"))
    return Group(*lines)


def _fluency(report: EvaluationReport) -> Table | None:
    found = report.fluency
    if found is None:
        return None
    table = _grid("\nfluency on everyday prompts", ("written by", "nats a token under plain", "", "distinct 3-grams"))
    for name, voice in (("model", found.model), ("plain", found.base)):
        table.add_row(name, number(voice.nll.value), _range(voice.nll), percent(voice.distinct_3grams))
    return table


def _dial(report: EvaluationReport) -> Table | None:
    found = report.dial
    if found is None:
        return None
    columns = (
        "confidence",
        "ratio",
        "heads / late",
        "same",
        "nats",
        "tokens/full",
        "dropped",
        "speed",
        f"of {found.batch}",
    )
    table = _grid("\nthe dial: quality and speed by --min-confidence", columns)
    for each in found.settings:
        late = [name for name in each.agreement_by_phase if name != "0"]
        share = sum(each.share_by_phase[name] for name in late)
        sure = (
            sum(each.agreement_by_phase[name] * each.share_by_phase[name] for name in late) / share
            if share
            else math.nan
        )
        heads = each.agreement_by_phase.get("0", math.nan)
        table.add_row(
            f"{each.min_confidence:g}" + ("" if each.min_confidence else ", fixed"),
            number(each.ratio.value),
            f"{percent(heads)} / {percent(sure)}",
            number(each.matched.value),
            number(each.nll.value),
            number(each.tokens_per_full_pass),
            number(each.dropped),
            f"{each.speed[0]:.2f}",
            f"{each.batch_speed[0]:.2f}",
        )
    table.add_row("plain", "1", "100%", "", number(found.base_nll.value), "1", "", "1", "1")
    return table


def _conventions(report: EvaluationReport) -> Table | None:
    found = report.conventions
    if found is None:
        return None
    table = _grid("\nconventions on the same rows", ("convention", "perplexity", "", "agreement", ""))
    for pair, result in found.results.items():
        table.add_row(
            " + ".join(pair),
            number(result.perplexity.value),
            _range(result.perplexity),
            percent(result.agreement.value),
            "best" if pair == found.best else "as good" if pair in found.as_good else "",
        )
    if found.as_good:
        table.caption = "as good: the paired 95% interval of its loss over the best's holds 0"
        table.caption_justify = "left"
    return table


def number(value: float) -> str:
    """Three significant digits at least, no exponents for what people read."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else "-"


def _range(estimate: Estimate) -> str:
    bounds = estimate.interval()
    return "-" if bounds is None else f"{number(bounds[0])}-{number(bounds[1])}"


def _percents(estimate: Estimate) -> str:
    bounds = estimate.interval()
    return "-" if bounds is None else f"{100 * bounds[0]:.1f}-{100 * bounds[1]:.1f}"
