"""What a verification found: plain frozen records, their JSON, the manifest's record and the table for a terminal."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import box
from rich.table import Table

from dmtd_runtime.errors import DmtdError

Level = Literal["structure", "graphs", "oracle"]
LEVELS: tuple[Level, ...] = ("structure", "graphs", "oracle")


class VerificationError(DmtdError):
    """The bundle does not compute what its model computes; the message names the first divergence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first place where a bundle and its model part. ``position`` is a token position (``row`` of a file: none).

    ``layer`` is the first absolute layer whose keys or values differ; a fault behind a layer's keys and values
    (attention, o_proj, MLP) first shows in the next one, and ``detail`` says so.
    """

    graph: str
    dialect: str = ""
    layer: int | None = None
    position: int | None = None
    expected: float | str | None = None
    got: float | str | None = None
    detail: str = ""

    def __str__(self) -> str:
        place = [self.graph + (f" ({self.dialect} dialect)" if self.dialect else "")]
        if self.layer is not None:
            place.append(f"layer {self.layer}")
        if self.position is not None:
            place.append(f"position {self.position}")
        values = "" if self.got is None else f": got {_text(self.got)}, expected {_text(self.expected)}"
        return ", ".join(place) + values + (f"; {self.detail}" if self.detail else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report. ``worst`` and ``margin`` are in ``unit`` (None: the check has no number)."""

    name: str
    level: Level
    ok: bool
    worst: float | None = None
    margin: float | None = None
    unit: str = ""
    cases: int = 1
    detail: str = ""
    near_ties: int = 0
    divergence: Divergence | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The outcome. ``level`` is the highest level that ran; ``level_note`` says why it was not a higher one."""

    level: Level
    checks: tuple[Check, ...]
    level_note: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    margins: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def near_ties(self) -> int:
        """Tokens that differed where the expected top two were closer than the margin."""
        return sum(check.near_ties for check in self.checks)

    @property
    def first_divergence(self) -> Divergence | None:
        for check in self.checks:
            if not check.ok:
                return check.divergence or Divergence(graph=check.name, detail=check.detail)
        return None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; a number that is not finite becomes a string."""
        first = self.first_divergence
        raw = {
            "ok": self.ok,
            "level": self.level,
            "level_note": self.level_note,
            "notes": list(self.notes),
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "first_divergence": dataclasses.asdict(first) if first else None,
            "near_ties": self.near_ties,
            "margins": self.margins,
            "seconds": round(self.seconds, 2),
        }
        result = _finite(raw)
        assert isinstance(result, dict), "a dictionary stays one"
        return result


def record(report: VerifyReport) -> dict[str, Any]:
    """What the manifest keeps of a verification: the report without its times and its text a check."""
    full = report.to_json()
    keys = ("name", "level", "ok", "worst", "margin", "unit", "cases", "near_ties")
    full["checks"] = [{key: check[key] for key in keys} for check in full["checks"]]
    for key in ("first_divergence", "seconds"):
        del full[key]
    return full


def render(report: VerifyReport) -> Table:
    """The report as a table for a terminal."""
    verdict = "[green]ok[/]" if report.ok else "[red]FAILED[/]"
    captions = [_plain(text) for text in (report.level_note, *report.notes) if text]
    if report.near_ties:
        captions.append(f"{report.near_ties} near-tie(s): the expected top two tokens are closer than the margin")
    first = report.first_divergence
    if first:
        captions.insert(0, f"[red]first divergence: {_plain(str(first))}[/]")
    table = Table(
        title=f"verify: {verdict}, level {report.level}, {report.seconds:.1f} s",
        caption="\n".join(captions) or None,
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, justify in (("", "left"), ("check", "left"), ("cases", "right"), ("worst", "right"), ("margin", "right")):
        table.add_column(
            name, justify="right" if justify == "right" else "left", no_wrap=name != "check", overflow="fold"
        )
    for check in report.checks:
        table.add_row(
            "[green]✓[/]" if check.ok else "[red]✗[/]",
            check.name + (f"\n[dim]{_plain(check.detail)}[/]" if check.detail else ""),
            str(check.cases),
            "" if check.worst is None else f"{check.worst:.2g}",
            "" if check.margin is None else f"{check.margin:.2g} {check.unit}",
        )
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _text(value: float | str | None) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
