"""A quantised checkpoint's own blocks in a bundle: no value is rounded again, and no byte is added but the tables'."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from export_support import export_options, read_manifest, stored_tensor
from gguf_files import permuted, tiny_config, write_gguf

from dmtd_export.bundle.export import export_bundle
from dmtd_export.errors import ExportError
from dmtd_export.evaluate.options import OpenOptions
from dmtd_export.evaluate.subject import open_subject
from dmtd_export.options import WeightOptions
from dmtd_export.verify import verify_bundle
from dmtd_export.verify.stored import stored_weight
from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import random_weights, write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import load_manifest

CONFIG = tiny_config(
    "llama", hidden_size=256, intermediate_size=256, num_heads=4, head_dim=64, tie_word_embeddings=True
)
TYPES = {  # of one layer: q and k of one format and v of another; every container, with minimums and without
    "self_attn.q_proj": "Q4_1",
    "self_attn.k_proj": "Q4_1",
    "self_attn.v_proj": "Q8_0",
    "self_attn.o_proj": "Q6_K",
    "mlp.gate_proj": "Q4_K",
    "mlp.up_proj": "Q4_0",
    "mlp.down_proj": "Q5_K",
}
SIMPLE = ("Q4_0", "Q4_1", "Q5_1", "Q8_0")  # that the library can write
HALVES = {"Q4_K": {0: 2e-4, 2: 1.5e-3}, "Q5_K": {0: 1e-4, 2: 1.5e-3}, "Q6_K": {208: 4e-5}}  # place -> factor


def raw_blocks(weight: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The matrix as the library quantises it, or where it cannot, random blocks with scales of a usual size."""
    if kind in SIMPLE:
        return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (weight.shape[0], weight.shape[1] // values, size)).astype(np.uint8)
    for place, factor in HALVES[kind].items():
        raw[..., place : place + 2] = np.frombuffer(np.float16(factor).tobytes(), np.uint8)
    return raw.reshape(weight.shape[0], -1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0 of all types; layer 1 of Q4_1 and a float matrix; the tied embedding in blocks of 16."""
    rng, weights = np.random.default_rng(0), random_weights(CONFIG, seed=0)
    kinds = {f"model.layers.0.{module}.weight": kind for module, kind in TYPES.items()}
    kinds |= {f"model.layers.1.{module}.weight": "Q5_1" for module in TYPES if module != "mlp.up_proj"}
    kinds["model.embed_tokens.weight"] = "Q6_K"
    stored = {}
    for name, kind in kinds.items():
        weight = weights[name]
        if "q_proj" in name or "k_proj" in name:
            weight = permuted(weight, CONFIG.num_heads if "q_proj" in name else CONFIG.num_kv_heads)
        stored[name] = raw_blocks(weight, kind, rng), kind
    return write_gguf(tmp_path_factory.mktemp("keep") / "model.gguf", CONFIG, weights, stored=stored)


def keep(checkpoint: Path, output: Path, target: str | None = None, **formats) -> Path:
    options = export_options(
        decoding_layers=1,
        cycle_length=2,
        max_num_seqs=2,
        max_model_len=64,
        target=target,
        formats=WeightOptions(**formats),
    )
    export_bundle(checkpoint, output, options)
    return output


def test_a_quantised_checkpoint_is_kept_and_computes_what_it_holds(checkpoint: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    bundle = keep(checkpoint, tmp_path / "b", "all", weights="keep")
    manifest = load_manifest(bundle)
    source = {name: fmt.source for name, fmt in manifest.quantised.items()}
    assert source == {f"model.layers.0.{module}.weight": kind for module, kind in TYPES.items()} | {
        f"model.layers.1.{module}.weight": "Q5_1" for module in TYPES if module != "mlp.up_proj"
    } | {"model.embed_tokens.weight": "Q6_K"}
    with open_checkpoint(checkpoint) as opened:
        for name in manifest.quantised:  # the library's own values, bit by bit
            np.testing.assert_array_equal(stored_weight(bundle, manifest, name), opened.read(name), err_msg=name)
        report = verify_bundle(bundle, checkpoint=opened, quick=True)
    assert report.ok, report.first_divergence
    assert report.level == "oracle"


def test_q4_1_and_q8_0_take_the_bytes_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    raw = read_manifest(keep(checkpoint, tmp_path / "b"))
    for module, kind in (("self_attn.q_proj", "Q4_1"), ("self_attn.v_proj", "Q8_0"), ("mlp.up_proj", "Q4_0")):
        parts = {n: info for n, info in raw["weights"].items() if n.startswith(f"model.layers.0.{module}.")}
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        rows = CONFIG.num_kv_heads * CONFIG.head_dim if "v_proj" in module else 256
        assert sum(info["length"] for info in parts.values()) == rows * 256 // values * size, module


@pytest.mark.parametrize(
    ("module", "stored"), [("mlp.gate_proj", 192), ("mlp.down_proj", 320), ("self_attn.o_proj", 320)]
)
def test_scales_of_k_quants_are_products_that_half_precision_does_not_hold(
    checkpoint: Path, tmp_path: Path, module: str, stored: int
) -> None:
    """A half-precision factor times a small integer has up to 17 binary digits: float32 keeps them, 256 values at a time."""
    bundle = keep(checkpoint, tmp_path / "b")
    raw = read_manifest(bundle)
    parts = {n: info for n, info in raw["weights"].items() if n.startswith(f"model.layers.0.{module}.")}
    assert sum(info["length"] for info in parts.values()) == 256 * stored
    for name, info in parts.items():
        if not name.endswith(".codes"):
            values = stored_tensor(bundle, raw, name)
            assert info["dtype"] == "float32" and (values.astype(np.float16) != values).any()


@pytest.mark.parametrize("changes", [{"target": "all"}, {"target": "tensorrt"}, {"dtype": "float16"}])
def test_where_blocks_cannot_be_kept_a_quantised_checkpoint_becomes_floats(
    checkpoint: Path, tmp_path: Path, changes: dict
) -> None:
    options = export_options(decoding_layers=1, cycle_length=2, max_num_seqs=1, max_model_len=64, **changes)
    assert not export_bundle(checkpoint, tmp_path / "b", options).quantised


def test_keep_wants_a_quantised_checkpoint(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    options = export_options(decoding_layers=1, cycle_length=2, formats=WeightOptions(weights_late="keep"))
    with pytest.raises(
        ExportError, match=r"weights_late: got keep, and .* is not quantised; choose int8, int4, .* or float"
    ):
        export_bundle(source, tmp_path / "b", options)


def test_a_kept_checkpoint_takes_another_format_for_a_group(checkpoint: Path, tmp_path: Path) -> None:
    manifest = load_manifest(keep(checkpoint, tmp_path / "b", weights="keep", weights_late="int8"))
    late = {fmt.source for name, fmt in manifest.quantised.items() if ".layers.1." in name}
    assert late == {"rtn"} and manifest.quantised["model.layers.0.self_attn.q_proj.weight"].source == "Q4_1"


def test_a_checkpoint_is_evaluated_in_floats(checkpoint: Path) -> None:
    """Its generated texts as its scores: what kernels for blocks round, a bundle's evaluation tells."""
    options = OpenOptions(split=SplitOptions(decoding_layers=1, cycle_length=2), threads=1)
    with open_subject(checkpoint, options) as subject:
        assert not load_manifest(subject.generation_bundle()).quantised
