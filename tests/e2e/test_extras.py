"""Every verb, with the libraries of each extra missing: it works, or says the pip line. Never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from gguf_files import tiny_config, write_gguf

from dmtd_export.cli.main import VERBS
from dmtd_models.reference.testing import random_weights

ROOT = Path(__file__).resolve().parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "runtime", "models"))}
EXTRAS = {
    "cpu": {"onnxruntime"},
    "export": {"onnx", "safetensors", "gguf", "ml_dtypes"},
    "oracle": {"torch"},
    "evaluate": {"matplotlib"},
    "train": {"transformers", "accelerate", "datasets", "peft", "reasoning_gym", "pyarrow"},
    "lm-eval": {"lm_eval"},
    "structured": {"llguidance"},
    "tensorrt": {"tensorrt", "tensorrt_rtx", "cuda"},
    "serve": {"fastapi", "uvicorn", "yaml"},
}
EXTRAS["all"] = set().union(*EXTRAS.values())
COMMANDS: dict[str, tuple[str, ...]] = {
    "finetune": ("finetune", "CHECKPOINT", "-o", "OUT", "--decoding-layers", "1", "--cycle-length", "2"),
    "finetune a GGUF": ("finetune", "GGUF", "-o", "OUT", "--decoding-layers", "1", "--cycle-length", "2"),
    "export": ("export", "CHECKPOINT", "-o", "OUT", "--decoding-layers", "1", "--cycle-length", "2", "--no-verify"),
    "export over a text": (
        *("export", "CHECKPOINT", "-o", "OUT", "--decoding-layers", "1", "--cycle-length", "2", "--no-verify"),
        *("--weights", "int4", "--weights-block", "16", "--calibration", "TEXT"),
    ),
    "build": ("build", "BUNDLE", "--dry-run"),
    "build simulator": ("build", "BUNDLE", "--backend", "simulator", "--dry-run"),
    "verify": ("verify", "BUNDLE", "--level", "structure"),
    "evaluate": ("evaluate", "CHECKPOINT", "--text", "no such text", "-o", "OUT"),
    "evaluate a bundle": ("evaluate", "BUNDLE", "--text", "TEXT", "--max-tokens", "64", "--prefixes", "0"),
    "evaluate with lm-eval": ("evaluate", "CHECKPOINT", "--lm-eval", "no_such_task"),
    "inspect": ("inspect", "BUNDLE"),
    "generate": ("generate", "BUNDLE", "--token-ids", "1,2", "--max-tokens", "2"),
    "generate a form": ("generate", "BUNDLE", "-p", "a", "--regex", "a", "--max-tokens", "2"),
    "generate over engines": ("generate", "BUNDLE", "--token-ids", "1,2", "--backend", "tensorrt-rtx"),
    "chat": ("chat", "BUNDLE"),
    "serve": ("serve", "TEXT", "--port", "0"),
    "bench": ("bench", "BUNDLE", "--max-tokens", "8", "--prompt-len", "2", "--repeats", "1", "--warmup", "0"),
    "bench with a plot": (
        "bench",
        "BUNDLE",
        "--serve",
        "--request-rate",
        "1,2",
        "--plot",
        "no.png",
        "--max-tokens",
        "8",
    ),
}
# What is asked for what is not there, so that it ends at once where its libraries are.
UNFIT = {"evaluate", "generate over engines", "serve", "chat"}
# What cannot be done without an extra, and the extra that the line names.
NAMED: dict[str, dict[str, str]] = {
    "cpu": dict.fromkeys(("generate", "generate a form", "bench", "evaluate a bundle"), "cpu"),
    "export": {
        **dict.fromkeys(("finetune", "finetune a GGUF"), "train"),
        **dict.fromkeys(("export", "export over a text", "build", "build simulator", "verify"), "export"),
        "evaluate": "evaluate",
    },
    "oracle": {"finetune": "train", "evaluate": "evaluate", "export over a text": "oracle"},
    "evaluate": {"finetune": "train", **dict.fromkeys(("evaluate", "bench with a plot"), "evaluate")},
    "train": {"finetune": "train", "finetune a GGUF": "train"},
    "lm-eval": {"evaluate with lm-eval": "lm-eval"},
    "structured": {"generate a form": "structured"},
    "tensorrt": {"build": "tensorrt-rtx", "generate over engines": "tensorrt-rtx"},
    "serve": {"serve": "serve"},
}
NAMED["all"] = NAMED["export"] | NAMED["cpu"] | NAMED["serve"] | {"generate over engines": "tensorrt-rtx"}
RUNNER = """
import json, sys
blocked, commands = (json.loads(argument) for argument in sys.argv[1:])
sys.modules.update(dict.fromkeys(blocked))  # neither imported nor found
from typer.testing import CliRunner
from dmtd_export.cli.main import app

def run(words):
    result = CliRunner().invoke(app, words, prog_name="dmtd", input="")
    crash = result.exception if result.exception and not isinstance(result.exception, SystemExit) else None
    return {"code": result.exit_code, "crash": crash and repr(crash), "out": result.stdout, "err": result.stderr}

print(json.dumps({name: run(words) for name, words in commands.items()}))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("extras"))


def tiny_gguf(path: Path) -> Path:
    config = tiny_config("qwen3")
    write_gguf(path, config, random_weights(config, seed=1))
    return path


def run_without(extras: Iterable[str], names: Iterable[str], bundle: Path, place: Path) -> dict[str, dict[str, Any]]:
    """What commands (``serve --help`` as well) tell in a process without the libraries of some extras: no traceback."""
    (place / "text.txt").write_text("It is what it is. " * 40, encoding="utf-8")
    places = {
        "BUNDLE": str(bundle),
        "CHECKPOINT": str(bundle.parent / "checkpoint"),
        "GGUF": str(tiny_gguf(place / "model.gguf")),
        "TEXT": str(place / "text.txt"),
    }
    commands = {
        name: [
            places.get(word, str(place / name) if word == "OUT" else word) for word in COMMANDS.get(name, name.split())
        ]
        for name in names
    }
    blocked = set().union(*(EXTRAS[extra] for extra in extras))
    if not blocked & EXTRAS["export"]:
        blocked.discard("yaml")  # gguf imports it
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(sorted(blocked)), json.dumps(commands)],
        capture_output=True,
        text=True,
        env=ENVIRON,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert {name: result["crash"] for name, result in told.items() if result["crash"]} == {}
    return told


def errors_of(result: dict[str, Any]) -> list[str]:
    errors = [line for line in result["err"].splitlines() if line.startswith("error: ")]
    assert (result["code"], len(errors)) in ((0, 0), (1, 1)), result
    return errors


def check_help(told: dict[str, dict[str, Any]]) -> None:
    for verb in VERBS:
        assert told[f"{verb} --help"]["code"] == 0, told[f"{verb} --help"]
        assert f"dmtd {verb}" in told[f"{verb} --help"]["out"]


HELP = [f"{verb} --help" for verb in VERBS]
LONG = {
    "finetune",
    "finetune a GGUF",
    "evaluate with lm-eval",
    "bench with a plot",
}  # libraries that take long to import


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_verb_without_its_extra_names_the_pip_line(extra: str, bundle: Path, tmp_path: Path) -> None:
    told = run_without([extra], NAMED[extra], bundle, tmp_path)
    for name, wanted in NAMED[extra].items():
        errors = errors_of(told[name])
        assert errors and f'pip install "dmtd[{wanted}]"' in errors[0], (name, told[name])


def needed_together() -> dict[tuple[str, ...], list[str]]:
    """The commands by the extras that they need."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in COMMANDS.keys() - LONG:
        needs = tuple(extra for extra in EXTRAS if extra != "all" and name in NAMED[extra])
        found.setdefault(needs, []).append(name)
    return {needs: sorted(names) for needs, names in sorted(found.items())}


@pytest.mark.parametrize("needs", needed_together(), ids=lambda needs: " ".join(needs) or "nothing")
def test_a_verb_works_without_all_that_it_does_not_need(needs: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    missing = EXTRAS.keys() - {*needs, "all"}
    names = needed_together()[needs]
    told = run_without(missing, [*names, *(HELP if not needs else ())], bundle, tmp_path)
    works = {name: result["err"] for name, result in told.items() if name not in UNFIT and errors_of(result)}
    assert not works
    if not needs:
        check_help(told)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_verb_with_one_extra_missing(extra: str, bundle: Path, tmp_path: Path) -> None:
    """All of them in each process, where the libraries that are there might look for one that is not."""
    names = [name for name in COMMANDS if name not in LONG or name in NAMED[extra]]
    told = run_without([extra], [*names, *HELP], bundle, tmp_path)
    check_help(told)
    for name in names:
        errors = errors_of(told[name])
        wanted = NAMED[extra].get(name)
        if wanted is not None:
            assert errors and f'pip install "dmtd[{wanted}]"' in errors[0], (name, told[name])
