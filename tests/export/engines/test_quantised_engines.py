"""Engines over weights in blocks: run by the simulator against the oracle, parsed and built by TensorRT-RTX on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from engine_support import load_engine_graph, make_bundle, quiet_logger, rtx
from gguf_files import permuted, tiny_config, write_gguf

from dmtd_export.bundle.export import export_bundle
from dmtd_export.engines import run as build_run
from dmtd_export.engines.network_check import check_network
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines, preview
from dmtd_export.engines.weights import copy_weights
from dmtd_export.errors import ExportError
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_export.verify import VerificationError, engines_hook
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import random_weights, write_tiny_checkpoint
from dmtd_runtime.bundle.contract import GraphName
from dmtd_runtime.bundle.manifest import load_manifest

MIXED = WeightOptions(weights="int4", weights_late="int8")
SIMULATOR = BuildOptions(backend="simulator", max_num_seqs=2, max_model_len=64)
SMALL = BuildOptions(backend="tensorrt-rtx", max_num_seqs=2, max_model_len=64)
CODES = "model.layers.1.self_attn.o_proj.codes"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_1's blocks, which have minimums, and an embedding of Q8_0, tied; float16."""
    root = tmp_path_factory.mktemp("kept")
    config = tiny_config("llama", intermediate_size=128, num_layers=3, tie_word_embeddings=True)
    weights = random_weights(config, seed=5)
    stored = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            kind = "Q8_0" if "embed" in name else "Q4_1"
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
            rows = permuted(weight, heads) if heads else weight
            stored[name] = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]), kind
    source = write_gguf(root / "model.gguf", config, weights, stored=stored)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=1, cycle_length=3),
        formats=WeightOptions(weights="keep"),
        target="tensorrt",
        dtype="float16",
        max_model_len=64,
    )
    export_bundle(source, root / "bundle", options)
    return root / "bundle"


def verified(bundle: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return dict(build_engines(bundle, SIMULATOR, verify=engines_hook()).record.verification)


@pytest.mark.parametrize(
    ("encoding", "tie", "dtype"),
    [
        (0, True, "float32"),
        pytest.param(2, False, "float32", marks=pytest.mark.slow),
        pytest.param(2, True, "float16", marks=pytest.mark.slow),
    ],
)
def test_the_simulator_computes_what_the_weights_mean(tmp_path: Path, encoding: int, tie: bool, dtype: str) -> None:
    """A tied table is in blocks for lm_head, and floats for the look-up. Biases too."""
    bundle = make_bundle(tmp_path, family="qwen2", encoding=encoding, tie=tie, dtype=dtype, formats=MIXED)
    found = verified(bundle)
    assert found["ok"] and found["level"] == "oracle"
    assert {check["margin"] for check in found["checks"]} == {2e-5 if dtype == "float32" else 12.0}


def test_the_simulator_computes_what_blocks_with_minimums_mean(kept: Path) -> None:
    assert load_manifest(kept).quantised["model.layers.0.mlp.up_proj.weight"].minimums
    """In float16, within its ULP."""
    found = verified(kept)
    assert found["ok"]
    for check in found["checks"]:
        assert check["margin"] == pytest.approx(6 * 3**0.5)


def test_codes_left_unsigned_are_caught(
    bundles: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(
        shutil.copytree(bundles(family="llama", tie=True, dtype="float32", formats=MIXED), tmp_path / "bundle")
    )
    real = build_run.copy_companions

    def unsigned(bundle: Path, directory: Path, manifest: Any) -> Any:
        files, info = real(bundle, directory, manifest), manifest.weights[CODES]
        codes = np.memmap(directory / "model.onnx.data", np.uint8, "r+", offset=info.offset, shape=(info.length,))
        codes ^= np.uint8(0x88)
        codes.flush()
        return files

    monkeypatch.setattr(build_run, "copy_companions", unsigned)
    with pytest.raises(VerificationError, match="the engines compute something else than the model"):
        verified(bundle)


def test_engines_read_the_stored_codes_about_zero(bundles: Callable[..., Path], tmp_path: Path) -> None:
    """Element by element: what was stored less the middle; all else as it stands."""
    bundle = bundles(family="llama", tie=True, dtype="float32", formats=MIXED)
    manifest = load_manifest(bundle)
    listed = copy_weights(bundle, tmp_path, manifest)
    stored, made = ((folder / "model.onnx.data").read_bytes() for folder in (bundle, tmp_path))
    assert listed.bytes == len(made) == len(stored) and listed.sha256 != manifest.files["model.onnx.data"].sha256
    halves = {name for name, info in manifest.weights.items() if name.endswith(".codes")}
    for name, info in manifest.weights.items():
        before, after = (content[info.offset : info.offset + info.length] for content in (stored, made))
        if name not in halves:
            assert before == after
            continue
        bits = manifest.quantised[name.replace(".codes", ".weight")].bits
        modulus = 1 << bits
        for one, other in list(zip(before, after, strict=True))[:: max(1, info.length // 50)]:
            for shift in range(0, 8, bits):
                code, signed = (one >> shift) % modulus, (other >> shift) % modulus
                assert code - modulus // 2 == (signed if signed < modulus // 2 else signed - modulus)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_engines_hold_the_codes_and_nothing_wider(tmp_path: Path, dtype: str) -> None:
    """Wide enough that small constants do not count; a tied lm_head is in late_decode, as codes."""
    rtx()
    source = write_tiny_checkpoint(
        tmp_path / "m", layers=3, tie=True, hidden_size=256, intermediate_size=1024, vocab_size=4096
    )
    split = SplitOptions(decoding_layers=1, cycle_length=3)
    formats = WeightOptions(weights="int4-symmetric")
    export_bundle(
        source,
        tmp_path / "b",
        ExportOptions(split=split, target="tensorrt", dtype=dtype, max_model_len=64, formats=formats),
    )
    seen = preview(tmp_path / "b", SMALL)
    result = build_engines(tmp_path / "b", SMALL)
    manifest = load_manifest(tmp_path / "b")
    stored = sum(info.length for info in manifest.weights.values())
    wider = 0 if dtype == "bfloat16" else sum(i.length for n, i in manifest.weights.items() if n.endswith(".scales"))
    held = sum(engine.weight_bytes for engine in result.record.engines)
    assert stored * 0.999 <= held <= (stored + wider) * 1.03  # scales are held in the model's type
    floats = 4096 * 256 * (2 if dtype == "bfloat16" else 4)
    assert (seen.tables_bytes, seen.copied_bytes) == (floats, manifest.files["model.onnx.data"].bytes)
    assert not (result.directory / "model.onnx.data").exists()


# What the parser made is read back.


@pytest.fixture
def read_back(bundles: Callable[..., Path], tmp_path: Path) -> Callable[..., None]:
    trt = rtx()

    def run(
        spoil: Callable[[Any, list[Any]], None] | None = None,
        bundle: Path | None = None,
        dtype: str = "bfloat16",
        name: GraphName = "thinking",
    ) -> None:
        bundle = bundle or bundles(family="llama", tie=True, dtype="bfloat16", formats=MIXED)
        graph = load_engine_graph(bundle, name)
        copy_weights(bundle, tmp_path, load_manifest(bundle))
        logger = quiet_logger(trt)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(graph.model.SerializeToString(), str(tmp_path / "thinking.onnx")), parser.get_error(
            0
        ).desc()
        if spoil:
            layers = [network.get_layer(i) for i in range(network.num_layers)]
            found = [layer for layer in layers if layer.type == trt.LayerType.DEQUANTIZE]
            for layer in found:
                layer.__class__ = trt.IDequantizeLayer
            spoil(trt, found)
        check_network(trt, network, graph, dtype)

    return run


@pytest.mark.parametrize("name", ["thinking", "late_decode"])
def test_networks_over_blocks_pass(read_back: Callable[..., None], kept: Path, name: GraphName) -> None:
    read_back(name=name)
    read_back(bundle=kept, dtype="float16", name=name)


def test_scales_of_8_bits_may_have_any_sign(bundles: Callable[..., Path], read_back: Callable[..., None]) -> None:
    """In float16, where they reach the parser as they are stored: it would refuse them as DequantizeLinear's."""
    bundle = bundles(family="llama", tie=True, dtype="float16", formats=WeightOptions(weights="int8"))
    info = load_manifest(bundle).weights["model.layers.3.mlp.up_proj.scales"]
    stored = np.memmap(bundle / "model.onnx.data", np.float16, "r", offset=info.offset, shape=info.shape)
    assert stored.min() < 0 < stored.max()
    read_back(bundle=bundle, dtype="float16", name="late_decode")


def along_the_other_axis(trt: Any, layers: list[Any]) -> None:
    layers[0].axis = 0


def other_codes(trt: Any, layers: list[Any]) -> None:
    """Keys and values have codes of one shape."""
    key, value = (next(x for x in layers if f"layers.1.self_attn.{kind}" in x.name) for kind in ("k_proj", "v_proj"))
    key.set_input(0, value.get_input(0))


def other_scales(trt: Any, layers: list[Any]) -> None:
    key, value = (next(x for x in layers if f"layers.1.self_attn.{kind}" in x.name) for kind in ("k_proj", "v_proj"))
    key.set_input(1, value.get_input(1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (along_the_other_axis, r"along axis 0, expected .* along axis 1"),
        (other_codes, r"reads INT4 from model\.layers\.1\.self_attn\.v_proj\.codes, expected INT4 from the constant"),
        (other_scales, r"has the scales model\.layers\.1\.self_attn\.v_proj\.scales, expected .*k_proj\.scales"),
    ],
)
def test_a_network_that_reads_its_blocks_otherwise_is_refused(
    read_back: Callable[..., None], spoil: Callable[[Any, list[Any]], None], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        read_back(spoil)


def test_the_parser_takes_no_codes_about_a_middle(bundles: Callable[..., Path]) -> None:
    """Why engines have codes of their own: the bundle's standard graph is refused."""
    trt = rtx()
    bundle = bundles(family="llama", tie=True, dtype="bfloat16", formats=MIXED)
    model = onnx.load(bundle / "thinking.onnx", load_external_data=False)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert not trt.OnnxParser(network, logger).parse(model.SerializeToString(), str(bundle / "thinking.onnx"))
