"""The page for operators: every option, path, metric and status of the server stands there, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dmtd_export.cli.main import VERBS, _LazyCommand
from dmtd_runtime.server.app import _STATUSES, Home, make_app
from dmtd_runtime.server.lifecycle import Lifecycle
from dmtd_runtime.server.metrics import Metrics
from dmtd_runtime.server.options import Limits, ServerOptions
from dmtd_runtime.serving.counts import Counts


@pytest.fixture
def page(repo_root: Path) -> str:
    return (repo_root / "runtime/dmtd_runtime/server/README.md").read_text()


def option_rows() -> list[str]:
    """The rows of the page's table, as the command has its options."""
    rows, backslash = [], "\\<"  # no tags of HTML
    for each in _LazyCommand("serve", VERBS["serve"]).load().params:
        if each.param_type_name == "option" and each.name != "model":
            default = "" if each.default in (None, False, "") else f"`{each.default}`"
            if isinstance(each.default, bool):
                default = "`on`" if each.default else ""
            flag = " / ".join(f"`{max(names, key=len)}`" for names in (each.opts, each.secondary_opts) if names)
            rows.append(f"| {flag} | {default} | {each.help.replace('<', backslash)} |")
    return rows


def test_every_option_stands_there(page: str) -> None:
    found = [line for line in page.splitlines() if line.startswith("| `--")]
    missing = [row for row in option_rows() if row not in found]
    assert missing == [], "the command has these"
    assert found == option_rows()


def test_every_path_stands_there(page: str) -> None:
    app: Any = make_app(Home(Lifecycle(shutdown_timeout_s=0)), options=ServerOptions(), limits=Limits())
    paths = {re.sub(r"\{.*", "NAME", route.path) for route in app._app.routes}
    [told] = re.findall(r"^## Paths\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(/[^`]*)`", told)) == paths


def test_every_metric_and_status_stands_there(page: str) -> None:
    text = Metrics("m", {"dmtd": Counts}).text().decode()
    names = set(re.findall(r"^# TYPE dmtd:(\S+) ", text, re.MULTILINE))
    [told] = re.findall(r"^## Metrics\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    listed = set()
    for word in re.findall(r"`([a-z0-9_{},]+)`", told):
        inner = re.search(r"\{(.*)\}", word)
        listed |= {word.replace(inner[0], each) for each in inner[1].split(",")} if inner else {word}
    assert listed - {"model_name", "engine", "dmtd", "plain"} == names
    [errors] = re.findall(r"^## Errors\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    assert {int(code) for code in re.findall(r"\b[45]\d\d\b", errors)} == set(_STATUSES)
