"""Real engines from tiny bundles, built by TensorRT-RTX on the CPU; what is cached, refused, interrupted or left behind."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from engine_support import make_bundle, rtx
from export_support import snapshot

from dmtd_export.engines import builder as engine_builder
from dmtd_export.engines import memory, run
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines, preview
from dmtd_export.errors import ExportError
from dmtd_export.graphs.engine import EngineGraph
from dmtd_runtime.bundle.engine_record import read_record
from dmtd_runtime.bundle.manifest import FileInfo, load_manifest
from dmtd_runtime.errors import BackendError, BundleError

SMALL = BuildOptions(backend="tensorrt-rtx", max_num_seqs=2, max_model_len=64)


@pytest.fixture
def bundle(bundles: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    shutil.copytree(bundles(family="llama", encoding=0, tie=True, dtype="float16"), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    ("family", "encoding", "dtype"),
    [
        ("qwen2", 2, "float16"),
        pytest.param("qwen3", 0, "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama", 0, "float32", marks=pytest.mark.slow),
        pytest.param("qwen3", 2, "float16", marks=pytest.mark.slow),
        pytest.param("qwen2", 0, "float16", marks=pytest.mark.slow),
        pytest.param("llama", 2, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_family_builds(tmp_path: Path, family: str, encoding: int, dtype: str) -> None:
    """From a bundle without standard graphs where there can be one: the parser looks for weights beside a file not there."""
    rtx()
    target = "tensorrt" if dtype == "bfloat16" else "onnxruntime"
    bundle = make_bundle(tmp_path, family=family, encoding=encoding, tie=family == "qwen3", dtype=dtype, target=target)
    told: list[tuple[str, int, int]] = []
    result = build_engines(bundle, SMALL, progress=lambda *each: told.append(each))
    record = result.record
    assert result.built and read_record(result.directory) == record
    record.check_files(result.directory, hashes=True)
    decoders = ["thinking", "late_decode", *(["full_pass"] if encoding else [])]
    graphs = [*decoders, *(g.name for g in load_manifest(bundle).graphs if g.name.endswith("_token"))]
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == [engine.graph for engine in record.engines] == graphs
    assert any(total for _, _, total in told) and all(0 <= done <= total for _, done, total in told)
    assert (record.backend, record.compute_capability, record.dtype) == ("tensorrt-rtx", "any", dtype)
    assert record.build.seconds > 0 and record.build.peak_bytes > 0
    manifest = load_manifest(bundle)
    layers = {"thinking": 3, "late_decode": 1 + encoding, "full_pass": 4}
    for engine in record.engines[: len(decoders)]:
        # The builder's own count of the weights it keeps: each layer once, no table but an untied head.
        head = 0 if family == "qwen3" or engine.graph == "thinking" else manifest.weights["lm_head.weight"].length
        sizes = [info.length for name, info in manifest.weights.items() if name.startswith("model.layers.0.")]
        assert 0 <= engine.weight_bytes - head - layers[engine.graph] * sum(sizes) < 60_000
        assert engine.scratch_bytes is not None and engine.scratch_bytes > 0 and engine.tactics
        assert engine.bytes == (result.directory / engine.file).stat().st_size > engine.weight_bytes


def test_extra_bytes_are_what_stands_in_two_engines(bundles: Callable[..., Path]) -> None:
    """With E = 0 the rotary tables alone; with E = 2 two layers, and with full_pass everything but the tables again."""
    rotary = 2 * 2 * 320 * 8
    for encoding in (0, 2):
        bundle = bundles(family="llama", encoding=encoding, tie=True, dtype="float16")
        layer = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64 + 2 * 64)
        host = BuildOptions(backend="simulator", max_model_len=64, fused=False)
        assert preview(bundle, host).extra_bytes == rotary + encoding * layer
        fused = preview(bundle, BuildOptions(backend="simulator", max_model_len=64, fused=True))
        assert fused.extra_bytes == 2 * rotary + (4 + encoding) * layer + 2 * 64


def test_device_weights_are_the_models_bytes_once(tmp_path: Path) -> None:
    """E = 0, staged: what the two engines keep and the table are at most 1.02 times the stored tensors."""
    rtx()
    # Wide enough that the few kilobytes of small constants do not count.
    from dmtd_export.bundle.export import export_bundle
    from dmtd_export.options import ExportOptions
    from dmtd_models.config.model import SplitOptions
    from dmtd_models.reference.testing import write_tiny_checkpoint

    source = write_tiny_checkpoint(
        tmp_path / "m", layers=3, tie=True, hidden_size=256, intermediate_size=1024, vocab_size=4096
    )
    export_bundle(
        source,
        tmp_path / "b",
        ExportOptions(
            split=SplitOptions(decoding_layers=1, cycle_length=3), target="tensorrt", dtype="float16", max_model_len=64
        ),
    )
    record = build_engines(tmp_path / "b", SMALL).record
    weights = load_manifest(tmp_path / "b").weights
    stored = sum(info.length for info in weights.values())
    on_device = sum(engine.weight_bytes for engine in record.engines) + weights["model.embed_tokens.weight"].length
    assert stored * 0.999 <= on_device <= stored * 1.02


def test_engines_that_stand_there_are_kept_until_forced_or_damaged(bundle: Path) -> None:
    first = build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64))
    again = build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64))
    assert (first.built, again.built, again.directory) == (True, False, first.directory)
    assert build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64, force=True)).built
    (first.directory / "thinking.onnx").write_bytes(b"")
    assert build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64)).built
    other = build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64, max_num_seqs=2))
    assert other.built and other.directory != first.directory and first.directory.is_dir()


def test_a_dry_run_writes_nothing_and_names_the_place(bundle: Path) -> None:
    before = snapshot(bundle)
    options = BuildOptions(backend="simulator", max_model_len=64)
    seen = preview(bundle, options)
    assert not seen.exists and snapshot(bundle) == before
    assert build_engines(bundle, options).directory == seen.directory
    assert preview(bundle, options).exists


def test_the_simulator_takes_its_graphs_and_a_copy_of_the_weights(bundle: Path) -> None:
    """No library builds, so what one would take is not asked for; the weights file holds the tables too."""
    options = BuildOptions(backend="simulator", max_model_len=64, fused=True)
    seen = preview(bundle, options)
    record = build_engines(bundle, options).record
    written = sum(engine.bytes for engine in record.engines) + sum(info.bytes for info in record.files.values())
    assert (seen.peak_bytes, seen.disk_bytes) == (0, written)


def test_a_bundle_needs_no_standard_graphs(tmp_path: Path) -> None:
    """Its engines are those of the bundle that has them, and nothing is added to it."""
    bundle = make_bundle(tmp_path / "a", target="onnxruntime", dtype="float32")
    whole = make_bundle(tmp_path / "b", target="all", dtype="float32")
    before = snapshot(bundle)
    options = BuildOptions(backend="simulator", max_model_len=64)
    seen = preview(bundle, options)
    assert snapshot(bundle) == before
    result, other = build_engines(bundle, options), build_engines(whole, options)
    assert result.directory == seen.directory and result.directory.name == other.directory.name
    for engine in other.record.engines:
        assert (result.directory / engine.file).read_bytes() == (other.directory / engine.file).read_bytes()
    assert result.record.content_sha256 == other.record.content_sha256
    assert not (bundle / "thinking.onnx").exists()
    load_manifest(bundle).check_files(bundle, hashes=True)
    assert not build_engines(bundle, options).built


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("unlisted", r"has no config\.json to write graphs from; export the bundle again"),
        ("other", r"config\.json: num_heads is 8, the manifest says 4; export the bundle again"),
    ],
)
def test_without_its_config_a_bundle_is_refused(bundle: Path, damage: str, message: str) -> None:
    manifest, config = load_manifest(bundle), bundle / "config.json"
    if damage == "unlisted":
        files = {name: info for name, info in manifest.files.items() if name != config.name}
        manifest = replace(manifest, files=files)
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 8, "head_dim": 16}))
        info = FileInfo(bytes=config.stat().st_size, sha256=hashlib.sha256(config.read_bytes()).hexdigest())
        manifest = replace(manifest, files={**manifest.files, config.name: info})
    (bundle / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(ExportError, match=message):
        build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64))


def test_too_little_memory_is_refused_before_anything_is_written(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx()
    monkeypatch.setattr(memory, "memory_bytes", lambda: (1 << 40, 100_000_000))
    with pytest.raises(ExportError, match=r"takes up to \d+ MB of memory, 100 MB are available; free some"):
        build_engines(bundle, SMALL)
    assert not (bundle / "engines").exists()


def test_too_little_disk_is_refused_before_anything_is_written(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1_000_000))
    with pytest.raises(ExportError, match=r"has 0.00 GB free, the engines need up to"):
        build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64))
    assert not (bundle / "engines").exists()


def test_a_full_disk_during_the_build_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **words: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_simulator_engine", full)
    with pytest.raises(ExportError, match=r"no space left while writing .*; nothing was kept"):
        build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64))
    assert not list((bundle / "engines").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_under_the_library_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx()
    real = engine_builder._make_writer
    monkeypatch.setattr(engine_builder, "_make_writer", lambda module, path: real(module, Path("/dev/full")))
    with pytest.raises(
        ExportError, match=r"no space left while writing .*: free some and build again; nothing was kept"
    ):
        build_engines(bundle, SMALL)
    assert not list((bundle / "engines").iterdir())


def test_what_a_killed_build_left_goes_with_the_next_of_any_sizes(bundle: Path) -> None:
    """What a build that is still at work holds stays."""
    engines = bundle / "engines"
    dead, at_work = engines / ".any-simulator-1-abc.partial-xyz", engines / ".any-simulator-1-def.partial-xyz"
    for place in (dead, at_work):
        (place / "new").mkdir(parents=True)
        (place / "new" / "thinking.engine").write_bytes(b"x")
    held = os.open(at_work, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        built = build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64)).directory
    finally:
        os.close(held)
    assert sorted(engines.iterdir()) == [at_work, built]


def test_an_altered_bundle_is_refused(bundle: Path) -> None:
    (bundle / "thinking.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"thinking\.onnx has 1 bytes"):
        build_engines(bundle, BuildOptions(backend="simulator", max_model_len=64))


def test_a_graph_that_the_parser_refuses_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx()
    written = run.engine_graph

    def softcapped(*words: Any) -> EngineGraph:
        graph = written(*words)
        for node in graph.model.graph.node:
            if node.op_type == "Attention":
                node.attribute.append(onnx.helper.make_attribute("softcap", 30.0))
        return graph

    monkeypatch.setattr(run, "engine_graph", softcapped)
    with pytest.raises(ExportError, match=r"tensorrt-rtx 1\.\S+ cannot parse thinking: .*--backend onnxruntime"):
        build_engines(bundle, SMALL)
    assert not list((bundle / "engines").iterdir())


def test_a_library_that_cannot_start_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = rtx()

    def broken(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", broken)
    with pytest.raises(BackendError, match=r"cannot start here .*no usable GPU or driver"):
        build_engines(bundle, SMALL)


@pytest.mark.parametrize("seconds", [0.05, 0.3])  # into parsing, and into the library's own threads
def test_ctrl_c_during_a_build_keeps_nothing(bundle: Path, repo_root: Path, seconds: float) -> None:
    rtx()
    path = os.pathsep.join(str(repo_root / part) for part in (".", "runtime", "models"))
    command = [sys.executable, "-m", "dmtd_export.cli", "build", str(bundle), "--backend", "tensorrt-rtx"]
    command += ["--max-num-seqs", "2", "--max-model-len", "64"]
    before = snapshot(bundle)
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        while "thinking" not in (line := child.stderr.readline()):
            assert line, "the build ended before it began"
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        _, rest = child.communicate(timeout=240)
    finally:
        child.kill()
    assert child.returncode == 130, rest
    assert "interrupted" in rest and "Traceback" not in rest
    assert snapshot(bundle) == before
    assert not list((bundle / "engines").iterdir())
