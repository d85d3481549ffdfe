"""``dmtd export`` and ``dmtd verify``: what they write, what they refuse, and what is left behind when they are cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import make_bundle, make_checkpoint
from typer.testing import CliRunner, Result

from dmtd_export.cli.main import VERBS, _LazyCommand, app
from dmtd_export.cli.progress import StageDisplay
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[3]
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "runtime", "models"))}
SPLIT = ("--decoding-layers", "2", "--cycle-length", "3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("export") / "checkpoint"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("verify"))


def dmtd(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="dmtd")


def test_defaults_are_those_of_the_options() -> None:
    parameters = {
        parameter.name: parameter.default for parameter in _LazyCommand("export", VERBS["export"]).load().params
    }
    for options in (ExportOptions(), SplitOptions(), WeightOptions()):
        for option in fields(options):
            default = getattr(options, option.name)
            assert option.name in ("split", "formats") or parameters[option.name] == (
                None if default == () else default
            )


def test_export_says_what_it_made_and_what_comes_next(checkpoint: str, tmp_path: Path) -> None:
    result = dmtd("export", checkpoint, "-o", str(tmp_path / "b"), *SPLIT, "--no-verify", "--max-num-seqs", "1")
    assert result.exit_code == 0, result.output
    assert "E0 T3 D2, cycle of 3" in result.stdout
    assert "dmtd chat" in result.stdout
    assert "verified" in result.stdout and "dmtd verify" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "records no convention" in warnings[0]


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (("--dtype", "bfloat16", "--weights", "fp8"), "dmtd build PLACE"),
        (("--dtype", "bfloat16", "--target", "tensorrt"), "dmtd build PLACE"),
        (("--dtype", "bfloat16"), "dmtd chat PLACE --device cuda"),
        (("--target", "tensorrt"), "dmtd chat PLACE"),
    ],
)
def test_what_comes_next_can_run_the_bundle(
    given: Sequence[str], command: str, checkpoint: str, tmp_path: Path
) -> None:
    result = dmtd("export", checkpoint, "-o", str(tmp_path / "b"), *SPLIT, *given, "--no-verify", "--max-num-seqs", "1")
    assert result.exit_code == 0, result.output
    told = "".join(result.stdout.split())  # a long place is broken into lines
    assert told.endswith("".join(f"next {command}".replace("PLACE", str(tmp_path / "b")).split()))


def test_the_format_that_costs_much_says_so_once(checkpoint: str, tmp_path: Path) -> None:
    for weights, times in (("int4-symmetric", 1), ("int4", 0)):
        chosen = ("--weights", weights, "--weights-block", "16")
        result = dmtd("export", checkpoint, "-o", str(tmp_path / weights), *SPLIT, *chosen, "--no-verify")
        assert result.exit_code == 0, result.output
        assert " ".join(result.output.split()).count("1.35 times the perplexity") == times


def test_every_option_arrives(checkpoint: str, tmp_path: Path) -> None:
    target = tmp_path / "b"
    result = dmtd(
        *("export", "-m", checkpoint, "--output", str(target), "--encoding-layers", "1", "--thinking-layers", "2"),
        *("--decoding-layers", "2", "--cycle-length", "4", "--cycle-origin", "absolute", "--prompt-input", "cyclical"),
        *(
            "--target",
            "onnxruntime",
            "--dtype",
            "float16",
            "--max-model-len",
            "100",
            "--max-num-seqs",
            "3",
            "--no-verify",
        ),
        "--json",
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["encoding_layers"], told["thinking_layers"], told["decoding_layers"]) == (1, 2, 2)
    manifest = load_manifest(target)
    assert (manifest.cycle.cycle_length, manifest.cycle.cycle_origin, manifest.cycle.prompt_input) == (
        4,
        "absolute",
        "cyclical",
    )
    assert (manifest.model.dtype, manifest.model.max_model_len) == ("float16", 100)
    assert {graph.dialect for graph in manifest.graphs if graph.name in contract.DECODER_GRAPHS} == {"onnxruntime"}
    assert max(graph.slots for graph in manifest.graphs) == 3
    assert manifest.verification == {}


def test_export_verifies_by_default(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("dmtd_export.verify")
    target = tmp_path / "b"
    result = dmtd(
        "export", checkpoint, "-o", str(target), *SPLIT, "--max-num-seqs", "1", "--target", "onnxruntime", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verification"]["ok"] is True
    assert load_manifest(target).verification["ok"] is True


REFUSED: list[tuple[str, Sequence[str], str]] = [
    ("no such model", ("/no/such", *SPLIT), "no such file or directory"),
    ("no split", ("MODEL",), "give --decoding-layers and --cycle-length"),
    ("wrong split", ("MODEL", "--decoding-layers", "9", "--cycle-length", "3"), "correct the split"),
    ("sum", ("MODEL", "--thinking-layers", "1", *SPLIT), "correct the split"),
    ("convention", ("MODEL", *SPLIT, "--cycle-origin", "prompt", "--prompt-input", "cyclical"), "undefined"),
    ("model length", ("MODEL", *SPLIT, "--max-model-len", "300"), "expected 2 to 256"),
    ("batch", ("MODEL", *SPLIT, "--max-num-seqs", "99"), "--max-num-seqs: got 99"),
    (
        "cycle",
        ("MODEL", "--decoding-layers", "2", "--cycle-length", "999"),
        "--cycle-length: got 999, expected 1 to 256",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_exports_leave_nothing(arguments: Sequence[str], words: str, checkpoint: str, tmp_path: Path) -> None:
    arguments = [checkpoint if word == "MODEL" else word for word in arguments]
    result = dmtd("export", *arguments, "-o", str(tmp_path / "b"), "--no-verify")
    [line] = result.stderr.splitlines()  # and no warning before it
    assert line.startswith("error: ")
    assert words in line
    assert result.exit_code == (2 if line.startswith("error: --") else 1), result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-num-seqs", "1000"), "--max-num-seqs: got 1000, expected 1 to 64"),
        (("--weights-block", "7"), "--weights-block: got 7, expected one of 16, 32, 64, 128"),
        (
            ("--calibration-tokens", "9000"),
            "--calibration-tokens: got 9000 and no text; give one with --calibration FILE",
        ),
        (
            ("--weights", "int4", "--calibration", "t", "--calibration-tokens", "9"),
            "-tokens: got 9, expected 256 to 1048576",
        ),
        (("--weights", "fp8", "--target", "all"), "--target: got all with weights in fp8, expected tensorrt"),
    ],
)
def test_an_option_out_of_range_is_told_before_the_libraries_are_loaded(
    arguments: Sequence[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dmtd_export.bundle.export", None)  # so that importing it fails
    result = dmtd("export", "nowhere", "-o", "b", *SPLIT, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "nowhere", "-o", "b", *SPLIT, "--kv", "int8", "--calibration", ""),
        ("evaluate", "nowhere", "--text", ""),
        ("evaluate", "nowhere", "--task", ""),
        ("finetune", "nowhere", "-o", "tuned", *SPLIT, "--data", ""),
    ],
    ids=lambda arguments: arguments[-2],
)
def test_no_name_is_not_the_current_directory(arguments: Sequence[str]) -> None:
    result = dmtd(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {arguments[-2]}: got an empty text; name a file, or leave the option out\n"


def test_a_target_that_is_no_bundle_is_left_alone(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    result = dmtd("export", checkpoint, "-o", str(tmp_path), *SPLIT, "--no-verify")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --output: ") and "exists and is not a bundle" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments", [("export",), ("export", "MODEL"), ("export", "MODEL", "-o", "x", "--dtype", "int3"), ("verify",)]
)
def test_wrong_usage_exits_2(arguments: Sequence[str], checkpoint: str) -> None:
    assert dmtd(*(checkpoint if word == "MODEL" else word for word in arguments)).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("build", "b", "--flavour", "host"), "error: --flavour: is called --backend now; write: --backend simulator"),
        (
            ("generate", "b", "-p", "x", "--flavour=tensorrt"),
            "error: --flavour: is called --backend now; write: --backend tensorrt",
        ),
        (
            ("export", "MODEL", "-o", "x", "--max-batch", "2"),
            "error: --max-batch: is called --max-num-seqs now; write: --max-num-seqs 2",
        ),
    ],
)
def test_an_option_of_old_is_told_its_new_name(arguments: Sequence[str], line: str) -> None:
    result = dmtd(*arguments)
    assert result.exit_code == 2 and result.stderr == line + "\n"
    assert dmtd("generate", "b", "-p", "--flavour", "--raw", "--no-such").stderr != line + "\n"  # a prompt is no option


def test_ctrl_c_leaves_the_old_bundle(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    shutil.copytree(bundle, target)
    before = (target / "manifest.json").read_bytes()
    # The signal comes while the weights are being written, in the export's own process.
    code = (
        "import os, signal, dmtd_export.bundle.export as e\n"
        "from dmtd_export.cli.main import main\n"
        "def cut(*args): os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)\n"
        "e.build_graph = cut\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "export",
            str(bundle.parent / "checkpoint"),
            "-o",
            str(target),
            *SPLIT,
            "--no-verify",
        ],
        capture_output=True,
        text=True,
        env=ENVIRON,
        check=False,
        timeout=60,
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert (target / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("verb", ["export", "verify"])
def test_a_missing_extra_names_its_pip_line(verb: str, bundle: Path) -> None:
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'onnx', 'safetensors', 'gguf', 'ml_dtypes', 'torch', 'onnxruntime'}:\n"
        "            raise ImportError(f'{name} is blocked in this test')\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from dmtd_export.cli.main import main; main(sys.argv[1:])"
    )
    arguments = [verb, str(bundle), *(("-o", "x") if verb == "export" else ())]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRON, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: dmtd {verb} needs onnx")
    assert done.stderr.endswith('pip install "dmtd[export]"\n')


def test_verify_passes_a_good_bundle(bundle: Path) -> None:
    pytest.importorskip("dmtd_export.verify")
    result = dmtd("verify", str(bundle), "--level", "structure", "--json")
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    assert (told["ok"], told["level"], told["first_divergence"]) == (True, "structure", None)
    assert "ok" in dmtd("verify", str(bundle), "--level", "structure").stdout


def test_verify_names_the_option_that_leads_nowhere(bundle: Path, checkpoint: str, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for option, arguments in (
        ("--checkpoint", ("--checkpoint", nowhere)),
        ("--adapter", ("--checkpoint", checkpoint, "--adapter", nowhere)),
    ):
        result = dmtd("verify", str(bundle), *arguments)
        assert result.exit_code == 2 and f"error: {option}: {nowhere}: no " in result.stderr


def test_what_is_not_for_a_device_is_refused_before_it_is_opened(bundle: Path) -> None:
    result = dmtd("verify", str(bundle), "--backend", "simulator", "--checkpoint", "/no/such")
    assert result.exit_code == 2
    assert "--checkpoint and --level are for the bundle" in " ".join(result.stderr.replace("│", "").split())


def test_verify_names_the_first_divergence(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("dmtd_export.verify")
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    with (damaged / "late_decode.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    result = dmtd("verify", str(damaged), "--level", "structure")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "first divergence" in last and "late_decode.onnx" in last


def test_without_a_terminal_a_long_stage_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("dmtd_export.cli.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with StageDisplay() as display:
        for done, at in ((0, 0.0), (1, 5.0), (2, 11.0), (3, 12.0), (4, 13.0), (4, 14.0)):
            now[0] = at
            display.verified("cycles", done, 4)
        for done in (0, 1, 2, 2):
            display.verified("graphs", done, 2)
    assert capsys.readouterr().err.splitlines() == [
        "verify: cycles ...",
        "verify: cycles: 2 of 4",
        "verify: cycles: 4 of 4",
        "verify: graphs ...",
    ]
