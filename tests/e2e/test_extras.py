"""Every verb, with the libraries of each extra missing: it works, or says the pip line. Never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    "serve": ("serve", "TEXT"),
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
# What cannot be done without an extra, and the extra that the line names.
NAMED: dict[str, dict[str, str]] = {
    "cpu": dict.fromkeys(("generate", "generate a form", "bench", "evaluate a bundle"), "cpu"),
    "export": {
        **dict.fromkeys(("finetune", "finetune a GGUF"), "train"),
        **dict.fromkeys(("export", "build", "build simulator", "verify"), "export"),
        "evaluate": "evaluate",
    },
    "oracle": {"finetune": "train", "evaluate": "evaluate"},
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

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
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


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_verb_works_or_names_the_pip_line(extra: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It is what it is. " * 40, encoding="utf-8")
    places = {
        "BUNDLE": str(bundle),
        "CHECKPOINT": str(bundle.parent / "checkpoint"),
        "GGUF": str(tiny_gguf(tmp_path / "model.gguf")),
        "TEXT": str(tmp_path / "text.txt"),
    }
    commands = {
        name: [places.get(word, str(tmp_path / name) if word == "OUT" else word) for word in words]
        for name, words in COMMANDS.items()
    }
    # Libraries that take long to import are left alone where another extra is missing.
    slow = {"finetune", "finetune a GGUF", "evaluate with lm-eval", "bench with a plot"}
    commands = {name: words for name, words in commands.items() if name not in slow or name in NAMED[extra]}
    commands |= {f"{verb} --help": [verb, "--help"] for verb in VERBS}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(sorted(EXTRAS[extra])), json.dumps(commands)],
        capture_output=True,
        text=True,
        env=ENVIRON,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {name: result["crash"] for name, result in told.items() if result["crash"]} == {}
    for verb in VERBS:
        assert told[f"{verb} --help"]["code"] == 0, told[f"{verb} --help"]
        assert f"dmtd {verb}" in told[f"{verb} --help"]["out"]
    for name in commands.keys() & COMMANDS.keys():
        errors = [line for line in told[name]["err"].splitlines() if line.startswith("error: ")]
        assert (told[name]["code"], len(errors)) in ((0, 0), (1, 1)), (name, told[name])
        wanted = NAMED[extra].get(name)
        if wanted is not None:
            assert errors and f'pip install "dmtd[{wanted}]"' in errors[0], (name, told[name])
