"""Cases run once each, in processes of their own, two at a time; tests read their traces. A table with the numbers comes last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median_low

import pytest
from cuda_host.cases import CASES, Case
from cuda_host.trace import Opened, read_trace

Running = Mapping[Case, Future[tuple[Path, subprocess.CompletedProcess[str]]]]
REPORTS = "DMTD_CUDA_HOST"  # where the cases of a run leave their numbers; set by environment.py
CASE_SECONDS = 120
PROCESSES = 2
COLUMNS = ("bundle, graphs, mode", "late", "full", "prefill", "waits", "memory", "captures", "replays")
MEANING = (
    "Launches of a late step, a full pass and a prefill (median, greedy, without those in replayed graphs); most waits of a\n"
    "step of a token a sequence; memory over what bundle and caches need; captures and replays of graphs."
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REPORTS not in os.environ:
        for item in items:
            if item.get_closest_marker("cuda_host"):
                item.add_marker(pytest.mark.skip(reason="needs an environment of its own: tools/test --cuda-host"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        # Of the session's scope, so that the tests of a case follow one another.
        metafunc.parametrize("case", CASES, ids=[case.name for case in CASES], scope="session", indirect=True)


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Every case that a test of this run asks for, started or about to be."""
    root = tmp_path_factory.mktemp("cuda_host")
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = dict.fromkeys(each["case"] for each in params if "case" in each)
    bundles = {case: case.model.export(root / case.model_name) for case in wanted}
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield {case: pool.submit(_run, bundles[case], case, root / f"{case.name}.tsv") for case in wanted}
        pool.shutdown(cancel_futures=True)


def _run(bundle: Path, case: Case, trace: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    command = [sys.executable, "-m", "cuda_host.drive", str(bundle), case.name]
    environment = {**os.environ, "STAND_IN_TRACE": str(trace)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CASE_SECONDS, check=False)
    return trace, done


@pytest.fixture(scope="session")
def ran(case: Case, processes: Running) -> tuple[list[Opened], subprocess.CompletedProcess[str]]:
    """The openings of the case, and how the process ended."""
    trace, done = processes[case].result()
    opened = read_trace(trace)
    trace.unlink()
    rows = [_row(case.name, o) for o in opened]
    (Path(os.environ[REPORTS]) / f"{case.name}.json").write_text(json.dumps(rows))
    return opened, done


def _row(name: str, opened: Opened) -> dict[str, str | int | float]:
    greedy = [step for step in opened.warm_steps() if step.choice == "greedy"]

    def launches(kind: str) -> int | str:
        counts = [step.launches for step in greedy if step.kind == kind]
        return median_low(counts) if counts else "-"

    count = [call.name for call in opened.calls if not call.error]
    values = (
        f"{name}, {opened.name}",
        launches("late"),
        launches("full"),
        launches("prefill"),
        max((len(step.waits) for step in opened.warm_steps("late", "full")), default="-"),
        round(opened.peak_bytes / opened.needed_bytes, 2) if opened.needed_bytes else "-",
        count.count("cudaStreamEndCapture"),
        count.count("cudaGraphLaunch"),
    )
    return dict(zip(COLUMNS, values, strict=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REPORTS not in os.environ:
        return
    rows = [row for path in sorted(Path(os.environ[REPORTS]).glob("*.json")) for row in json.loads(path.read_text())]
    if rows:
        terminalreporter.section("calls of ONNX Runtime's CUDA provider")
        terminalreporter.write_line(MEANING)
        for row in (COLUMNS, *(row.values() for row in rows)):
            terminalreporter.write_line(_line(*row))


def _line(first: object, *others: object) -> str:
    return f"{first!s:66}" + "".join(f"{value!s:>9}" for value in others)
