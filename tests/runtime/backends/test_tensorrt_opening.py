"""`--backend tensorrt` from the command line and the API: text as ONNX Runtime gives it, and what is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, make_checkpoint
from fake_cuda import FakeCuda, FakeRtx, install_fakes
from typer.testing import CliRunner, Result

from dmtd_export.bundle.export import export_bundle
from dmtd_export.cli.main import app
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_runtime import LLM, BackendError, BundleError, RequestError, SamplingParams
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.bundle.engine_record import read_record

SIMULATOR = ("--backend", "simulator")


def dmtd(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, prog_name="dmtd")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_bundle(tmp_path_factory.mktemp("opening"))
    build_engines(made, BuildOptions(backend="simulator", max_num_seqs=2))
    return made


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def engine_directory(bundle: Path) -> Path:
    [directory] = (bundle / "engines").iterdir()
    return directory


def test_generate_prints_what_onnxruntime_prints(bundle: Path) -> None:
    for options in (("--greedy",), ("--seed", "5", "--temperature", "0.9", "--repetition-penalty", "1.2")):
        arguments = ("generate", str(bundle), "-p", "Hello there", "--max-tokens", "21", "--json", *options)
        wanted, got = (json.loads(dmtd(*arguments, *more).stdout) for more in ((), SIMULATOR))
        assert got["token_ids"] == wanted["token_ids"]
        assert got["text"] == wanted["text"]
        assert got["full_passes"] > 0


def test_chat_answers(bundle: Path) -> None:
    result = dmtd("chat", str(bundle), "--greedy", "--max-tokens", "9", *SIMULATOR, stdin="Hi\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == dmtd("chat", str(bundle), "--greedy", "--max-tokens", "9", stdin="Hi\n").stdout


@pytest.mark.parametrize("graphs", ["--cuda-graphs", "--no-cuda-graphs"])
def test_bench_times_whole_cycles(bundle: Path, graphs: str) -> None:
    result = dmtd(
        *("bench", str(bundle), "--batch", "1,2", "--prompt-len", "5", "--max-tokens", "20"),
        *("--repeats", "1", "--warmup", "0", "--json", graphs, *SIMULATOR),
    )
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    for batch in report["batches"]:
        assert batch["cycle_ms"] > 0
        assert batch["full_pass_ms"] is None
        assert batch["runs"]["dmtd"][0]["full_passes"] == 7  # 19 tokens behind the prompt's, in cycles of 3
        assert batch["runs"]["plain"][0]["late_steps"] == 0
    conditions = report["conditions"]
    assert (conditions["backend"], conditions["tensorrt"], conditions["gpu"]) == ("simulator", None, None)


def test_bench_shows_cycles_to_people(bundle: Path) -> None:
    shown = dmtd(
        *("bench", str(bundle), "--batch", "1", "--prompt-len", "5", "--max-tokens", "20"),
        *("--repeats", "1", "--warmup", "0", *SIMULATOR),
    )
    assert "cycle, ms" in shown.stdout
    assert "standard dialect" in " ".join(shown.stdout.split())


def test_several_requests_share_batches_and_stop_strings_are_never_shown(bundle: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=30)
    with LLM(bundle, max_num_seqs=2) as llm:
        wanted = [output.outputs[0].text for output in llm.generate(["one", "two", "three"], params)]
    with LLM(bundle, backend="simulator", max_num_seqs=2) as llm:
        got = [output.outputs[0].text for output in llm.generate(["one", "two", "three"], params)]
        assert got == wanted
        for text, prompt in zip(wanted, ("one", "two", "three"), strict=True):
            stop = text[4:7]
            stopping = SamplingParams(temperature=0, max_tokens=30, stop=stop)
            [output] = llm.generate(prompt, stopping)
            assert output.outputs[0].text == text[: text.index(stop)]
            assert output.outputs[0].finish_reason == "stop"
            streamed = "".join(
                delta.text for delta in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=30, stop=stop))
            )
            assert streamed == output.outputs[0].text


def one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


def generate(bundle: Path, *options: str) -> Result:
    return dmtd("generate", str(bundle), "-p", "x", "--max-tokens", "3", *options)


def test_a_bundle_without_engines_names_the_build_command(copied: Path) -> None:
    shutil.rmtree(copied / "engines")
    one_line(generate(copied, *SIMULATOR), "has no engines; build them with: dmtd build", "--backend simulator")


def test_engines_of_other_weights_are_refused(copied: Path) -> None:
    path = engine_directory(copied) / "engine.json"
    record = read_record(path.parent)
    path.write_text(replace(record, content_sha256="0" * 64).to_json())
    one_line(generate(copied, *SIMULATOR), "graphs or weights have changed since", "dmtd build")


def test_a_damaged_engine_is_found_before_it_is_loaded(copied: Path) -> None:
    engine = engine_directory(copied) / "thinking.onnx"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    one_line(generate(copied, *SIMULATOR), "altered; build it again with: dmtd build")
    engine.write_bytes(content[:100])
    one_line(generate(copied, *SIMULATOR), "has 100 bytes", "truncated or altered; build it again")


def test_more_than_the_engines_were_built_for_is_refused(bundle: Path) -> None:
    with pytest.raises(
        BackendError, match=r"max_num_seqs: built for up to 2, asked for 3; .*dmtd build .*--max-num-seqs 3"
    ):
        LLM(bundle, backend="simulator", max_num_seqs=3)
    with pytest.raises(RequestError, match=r"max_model_len: got 1000, expected 1 to \d+, the bundle's limit"):
        LLM(bundle, backend="simulator", max_model_len=1000)
    with pytest.raises(
        RequestError, match="backend: got 'cuda', expected one of onnxruntime, tensorrt, tensorrt-rtx, simulator"
    ):
        BackendOptions(backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs: got 0, expected at least 1$"),
        ({"max_num_seqs": "2"}, "max_num_seqs: got '2', expected a whole number"),
        ({"max_model_len": 2.5}, "max_model_len: got 2.5, expected a whole number"),
        ({"dialect": "standard"}, "dialect: got 'standard' with the backend simulator"),
        ({"cuda_graphs": "no"}, "cuda_graphs: got 'no', expected True or False"),
        ({"threads": 0}, "threads: got 0, expected at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        LLM(bundle, backend="simulator", **options)


def test_a_bfloat16_bundle_is_refused_by_the_simulator(tmp_path: Path) -> None:
    """Building its graphs is not: they may be looked at."""
    options = ExportOptions(split=SplitOptions(decoding_layers=2, cycle_length=3), dtype="bfloat16", verify=False)
    export_bundle(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    build_engines(tmp_path / "bundle", BuildOptions(backend="simulator", max_num_seqs=1))
    one_line(
        generate(tmp_path / "bundle", *SIMULATOR),
        "bfloat16, which ONNX Runtime cannot run on the CPU",
        "--dtype float32",
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install_fakes(monkeypatch)


def as_rtx(bundle: Path, **changes: Any) -> None:
    """The simulator's engines, said to be TensorRT-RTX's."""
    path = engine_directory(bundle) / "engine.json"
    record = replace(read_record(path.parent), backend="tensorrt-rtx", version=FakeRtx.__version__, **changes)
    path.write_text(record.to_json())


def test_the_whole_way_over_the_cuda_device(fake: FakeCuda, copied: Path) -> None:
    wanted = generate(copied, *SIMULATOR, "--greedy").stdout
    as_rtx(copied)
    result = generate(copied, "--backend", "tensorrt-rtx", "--greedy")
    assert result.exit_code == 0, result.output
    assert result.stdout == wanted


def test_engines_of_another_machine_are_refused_before_they_are_loaded(fake: FakeCuda, copied: Path) -> None:
    as_rtx(copied, compute_capability="12.0")
    one_line(
        generate(copied, "--backend", "tensorrt-rtx"),
        "compute capability: built for 12.0, here 8.9",
        "--compute-capability 8.9",
    )
    as_rtx(copied, compute_capability="any", max_num_seqs=2)
    path = engine_directory(copied) / "engine.json"
    path.write_text(replace(read_record(path.parent), version="1.6.0").to_json())
    one_line(generate(copied, "--backend", "tensorrt-rtx"), "version: built for 1.6.0, here 1.7.1.116", "dmtd build")


def test_a_gpu_that_is_too_old_is_refused_before_engines_are_looked_for(fake: FakeCuda, copied: Path) -> None:
    fake.capability = (7, 5)
    as_rtx(copied)
    one_line(
        generate(copied, "--backend", "tensorrt-rtx"),
        "(Fake GPU) has compute capability 7.5, engines need 8.0 or later, for bfloat16 and fused attention",
    )


def test_a_gpu_newer_than_the_library_names_is_served(fake: FakeCuda, copied: Path) -> None:
    as_rtx(copied, compute_capability="any", supported=("8.0", "8.9"))
    fake.capability = (13, 0)
    assert generate(copied, "--backend", "tensorrt-rtx", "--greedy").exit_code == 0


def test_bench_names_the_gpu_that_it_ran_on(
    fake: FakeCuda, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one that nvidia-smi shows first: CUDA_VISIBLE_DEVICES may hide that."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'Other GPU, 580.1, 24000, 8.6'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    as_rtx(copied)
    result = dmtd(
        *("bench", str(copied), "--backend", "tensorrt-rtx", "--prompt-len", "5", "--max-tokens", "8"),
        *("--repeats", "1", "--warmup", "0", "--json"),
    )
    assert result.exit_code == 0, result.output
    conditions = json.loads(result.stdout)["conditions"]
    assert (conditions["gpu"], conditions["driver"]) == ("Fake GPU", "580.1")


def test_no_driver_and_no_library_are_one_line(fake: FakeCuda, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.driver = 0
    one_line(generate(copied, "--backend", "tensorrt-rtx"), "no NVIDIA driver on this machine")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # type: ignore[arg-type]
    one_line(generate(copied, "--backend", "tensorrt-rtx"), 'pip install "dmtd[tensorrt-rtx]"')


def test_a_record_that_is_no_record_is_one_line(copied: Path) -> None:
    (engine_directory(copied) / "engine.json").write_text("{")
    with pytest.raises(BundleError, match=r"engine\.json cannot be read as JSON"):
        LLM(copied, backend="simulator")
