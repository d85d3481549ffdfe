"""The study of models/study: what each split and cycle length costs in quality and gains in speed, on SmolLM2-135M.

    tools/study --work DIR                        everything: text, every setting that is not done yet, speeds
    tools/study --work DIR --only d8-tau4         one setting
    tools/study --work DIR --report models/study  tables and figures from what is done

Every setting goes through the product: `dmtd finetune`, `dmtd evaluate`, `dmtd export`, `dmtd bench`. A setting is done when its
result files are there; an interrupted one goes on where it stopped. Settings run side by side, one on each core with one thread,
which is faster than one after another on all; speeds are measured last and alone. Needs the extras `cpu` and `train`, and the
package reasoning-gym.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from study.text import CHATS, EVALUATION, PROSE, evaluated_on, held_out_texts, task_files, training_sources

REPO = Path(__file__).resolve().parents[2]
SEARCH_PATH = [str(REPO), str(REPO / "runtime"), str(REPO / "models")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run: a split with a cycle length, and what differs from the defaults of `dmtd finetune`."""

    name: str
    cycle_length: int
    decoding_layers: int = 8
    encoding_layers: int = 0
    options: tuple[str, ...] = ()
    offsets: bool = False  # also evaluated with the first head at every place of a cycle

    @property
    def split(self) -> list[str]:
        layers = ["--encoding-layers", str(self.encoding_layers), "--decoding-layers", str(self.decoding_layers)]
        return [*layers, "--cycle-length", str(self.cycle_length)]

    @property
    def stored(self) -> tuple[int, bool] | None:
        """Frozen layers whose work is stored, and whether for the grid's text: runs alike in both share it. None: nothing is."""
        return None if "--train" in self.options else (_LAYERS - self.decoding_layers, self in GRID)


_LAYERS = 30  # of SmolLM2-135M
# Splits by cycle lengths: their bundles' speed is measured too. Neighbours differ in what they store, so that none waits.
GRID = tuple(
    Setting(name=f"d{late}-tau{cycle}", decoding_layers=late, cycle_length=cycle)
    for cycle in (4, 2, 3)
    for late in (8, 16)
)
# Each differs from ``late`` in one thing. Training all layers takes several times as long, so all of these get fewer tokens.
COMPARISONS = (
    Setting(name="late", cycle_length=4, offsets=True),
    Setting(name="full", cycle_length=4, options=("--train", "full", "--learning-rate", "5e-4")),
    Setting(name="next-token", cycle_length=4, options=("--distill", "0")),
    Setting(name="lora", cycle_length=4, options=("--train", "lora", "--learning-rate", "1e-3")),
    Setting(name="absolute", cycle_length=4, options=("--cycle-origin", "absolute")),
    Setting(name="fixed-phase", cycle_length=4, options=("--fixed-phase",), offsets=True),
)
SETTINGS = {setting.name: setting for setting in (*GRID[:4], *COMPARISONS, *GRID[4:])}


def main() -> None:
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.report is not None:
        from study.report import collect, write_report

        write_report(collect(arguments.work, tuple(SETTINGS), conditions(arguments)), arguments.report)
        return
    chosen = [SETTINGS[name] for name in arguments.only or SETTINGS]
    make_text(arguments)
    if not arguments.only_bench:
        train_and_evaluate(chosen, arguments)
    if not arguments.no_bench:
        for setting in chosen:
            if setting in GRID:
                bench(setting, arguments)


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers hang on besides the settings."""
    import torch

    from dmtd_runtime.machine.hardware import look_at_machine

    commit = subprocess.run(
        ["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
    )

    return {
        "tokens": arguments.tokens,
        "comparison_tokens": arguments.comparison_tokens,
        "evaluation_tokens": arguments.evaluation_tokens,
        "jobs": arguments.jobs,
        "cpu": look_at_machine().cpu,
        "isa": look_at_machine().isa,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def make_text(arguments: argparse.Namespace) -> None:
    """What to train on and what is held out, its parts side by side."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [
            pool.submit(run, "-m", "study.text", str(arguments.base), str(arguments.work / "text"), part)
            for part in (EVALUATION, PROSE, *CHATS)
        ]:
            done.result()


def train_and_evaluate(chosen: Sequence[Setting], arguments: argparse.Namespace) -> None:
    """Settings side by side; of those that share stored features, the first computes them alone."""
    firsts: Mapping[Any, threading.Lock] = {setting.stored: threading.Lock() for setting in chosen}
    stored: set[Any] = {None}

    def one(setting: Setting) -> None:
        with firsts[setting.stored]:
            if setting.stored not in stored:
                train(setting, arguments)
                stored.add(setting.stored)
        train(setting, arguments)
        evaluate(setting, arguments)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(one, setting) for setting in chosen]:
            done.result()


def train(setting: Setting, arguments: argparse.Namespace) -> None:
    """`dmtd finetune`: an adapter and the log of its training."""
    output = arguments.work / setting.name
    if (output / "summary.json").is_file():
        return
    command = ["finetune", str(arguments.base), "-o", str(output), *setting.split, "--save", "adapter"]
    for source in training_sources(arguments.work / "text"):
        command += ["--data", str(source)]
    for source in evaluated_on(arguments.work / "text"):
        command += ["--decontaminate", str(source)]
    tokens = arguments.tokens if setting in GRID else arguments.comparison_tokens
    command += ["--max-tokens", str(tokens), "--eval-every", str(tokens // 10), "--seed", "0"]
    if setting.stored:
        command += ["--cache-dir", str(arguments.work / "features")]
    dmtd(*command, *setting.options, "--threads", "1", log=arguments.work / f"{setting.name}.log")


def evaluate(setting: Setting, arguments: argparse.Namespace) -> None:
    """`dmtd evaluate` against the plain model: chats, prose and code, and for the grid tasks."""
    output = arguments.work / setting.name / "evaluation"
    if (output / "report.json").is_file():
        return
    command = ["evaluate", str(arguments.base), "--adapter", str(arguments.work / setting.name), "-o", str(output)]
    for text in held_out_texts(arguments.work / "text"):
        command += ["--text", str(text)]
    for task in task_files(arguments.work / "text") if setting in GRID else ():
        command += ["--task", str(task)]
    if setting.offsets:
        command += ["--offsets"]
    command += ["--max-tokens", str(arguments.evaluation_tokens), "--prefixes", "32"]
    command += ["--dtype", "bfloat16", "--threads", "1"]
    dmtd(*command, log=arguments.work / f"{setting.name}.log")


def bench(setting: Setting, arguments: argparse.Namespace) -> None:
    """`dmtd bench` of the split: speed depends on no weight, so the plain ones serve."""
    result = arguments.work / setting.name / "bench.json"
    if result.is_file():
        return
    bundle = arguments.work / "bundle"
    log = arguments.work / f"{setting.name}.log"
    options = ["--target", "onnxruntime", "--max-num-seqs", "1", "--no-verify"]
    dmtd("export", str(arguments.base), "-o", str(bundle), *setting.split, *options, log=log)
    result.parent.mkdir(exist_ok=True)
    result.write_text(dmtd("bench", str(bundle), "--json", log=log), encoding="utf-8")


def dmtd(*arguments: str, log: Path) -> str:
    """One verb; what it says goes to ``log``, its result is returned."""
    started = time.monotonic()
    print(f"$ dmtd {' '.join(arguments)}", file=sys.stderr, flush=True)
    with log.open("a", encoding="utf-8") as said:
        result = run("-m", "dmtd_export.cli", *arguments, stderr=said)
        said.write(result)
    print(f"  {time.monotonic() - started:.0f} s: dmtd {arguments[0]}, {log.stem}", file=sys.stderr, flush=True)
    return result


def run(*arguments: str, stderr: IO[str] | None = None) -> str:
    """A Python process of this repository; returns what it printed.

    Raises:
        SystemExit: it failed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SEARCH_PATH)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, check=False, text=True, stdout=subprocess.PIPE, stderr=stderr
    )
    if done.returncode:
        where = "" if stderr is None else f"; see {stderr.name}"
        raise SystemExit(f"{' '.join(arguments[:4])} ... ended with {done.returncode}{where}")
    return done.stdout


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of all runs")
    parser.add_argument("--base", type=Path, help="the plain model; SmolLM2-135M by default")
    parser.add_argument("--only", action="append", choices=sorted(SETTINGS), help="settings; all by default")
    parser.add_argument(
        "--tokens", type=int, default=610_000, help="of a run of the grid; by default one pass over the text"
    )
    parser.add_argument("--comparison-tokens", type=int, default=100_000, help="of a run of the comparisons")
    parser.add_argument("--evaluation-tokens", type=int, default=12_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="settings side by side")
    parser.add_argument("--no-bench", action="store_true", help="leave out the measurements of speed")
    parser.add_argument("--only-bench", action="store_true", help="measure speeds alone")
    parser.add_argument("--report", type=Path, help="write tables and figures of what is done into this directory")
    arguments = parser.parse_args()
    if arguments.base is None:
        from study.smollm2 import default_cache_dir, fetch_smollm2

        arguments.base = fetch_smollm2(default_cache_dir())
    return arguments
