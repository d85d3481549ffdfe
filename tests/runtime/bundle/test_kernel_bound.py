"""What the kernels allow, against figures worked out by hand from the times they were measured with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.kernel_bound import kernel_bound
from dmtd_runtime.bundle.manifest import BlockFormat, Manifest, WeightInfo, load_manifest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("kernels")
    checkpoint = write_tiny_checkpoint(root / "model", layers=4, tie=True)
    options = ExportOptions(
        split=SplitOptions(decoding_layers=1, cycle_length=4),
        target="onnxruntime",
        max_num_seqs=1,
        formats=WeightOptions(weights="int4", weights_lm_head="int4", weights_embedding="int4"),
    )
    export_bundle(checkpoint, root / "bundle", options)
    return load_manifest(root / "bundle")


def smollm2(tiny: Manifest, bits: int) -> Manifest:
    """E0 T22 D8 of SmolLM2-135M: in each layer one matrix of all its 3,538,944 weights, and the tied lm_head."""
    shapes = {f"model.layers.{i}.mlp.up_proj": (3_538_944 // 576, 18) for i in range(30)}
    shapes["model.embed_tokens"] = (49152, 18)
    fmt = BlockFormat(bits=bits, block=32, minimums=False, levels=1 << bits, source="rtn")
    stored = WeightInfo(dtype="uint8", shape=(), offset=0, length=0, norm=0.0, probe=0.0)
    weights = {f"{m}.codes": replace(stored, shape=(*shape, fmt.code_bytes)) for m, shape in shapes.items()}
    weights |= {f"{m}.scales": replace(stored, dtype="float16", shape=shape) for m, shape in shapes.items()}
    return replace(
        tiny,
        model=replace(tiny.model, num_layers=30),
        cycle=replace(tiny.cycle, thinking_layers=22, decoding_layers=8),
        weights=weights,
        quantised={f"{m}.weight": fmt for m in shapes},
    )


@pytest.mark.parametrize(
    ("bits", "batch", "bound"),
    [
        # us: T 5372, D 1953.5, lm_head 934.3; four rows of T cost 1.6 of one: 4 x 8259.8 / (8595.3 + 4 x 2887.8)
        (4, 1, 1.6399),
        # T 9187.1, D 3340.8, lm_head 2095.1, 1.66: 4 x 14622.9 / (15250.6 + 4 x 5435.8)
        (8, 1, 1.5812),
        # at 2 sequences 8 rows of T against 2: 4 x 8259.8 x 1.2 / (5372 x 2.4 + 4 x 2887.8 x 1.2)
        (4, 2, 1.4819),
    ],
)
def test_bounds_of_smollm2(tiny: Manifest, bits: int, batch: int, bound: float) -> None:
    assert kernel_bound(smollm2(tiny, bits), 0, batch) == pytest.approx(bound, abs=2e-4)


def test_long_contexts_read_caches(tiny: Manifest) -> None:
    model = smollm2(tiny, 4)
    bounds = [kernel_bound(model, context) for context in (0, 1000, 100_000)]
    assert None not in bounds and sorted(bounds) == bounds  # T's cache is read once a cycle


def test_int8_caches_are_read_faster_but_not_by_a_refill(tiny: Manifest) -> None:
    """Where caches are all: of T four rows cost 1.21 of one; a value costs 165 ps, and 315 as a float."""
    model = smollm2(tiny, 4)
    int8 = replace(model, model=replace(model.model, kv_dtype="int8"))
    assert kernel_bound(model, 1e12) == pytest.approx(4 * 30 / (22 + 4 * 8), abs=1e-4)
    assert kernel_bound(int8, 1e12) == pytest.approx(4 * 30 / (22 * 1.21 + 4 * 8), abs=1e-4)
    # us at a context of 100,000, 64 values a row and layer: T 23232, D 8448 beside the weights' 5372 x 1.6 and 2887.8
    bound = 4 * (8259.8 + 31680) / (8595.3 + 23232 * 1.21 + 4 * (2887.8 + 8448))
    assert kernel_bound(int8, 100_000) == pytest.approx(bound, abs=2e-4)


def test_floats_have_the_bound_of_their_bytes_alone(tiny: Manifest) -> None:
    assert kernel_bound(replace(tiny, quantised={}), 0) is None


def test_every_matrix_of_a_bundle_counts_once(tiny: Manifest) -> None:
    """A tied embedding counts as lm_head, for that is what multiplies by it."""
    assert kernel_bound(tiny, 0) == pytest.approx(_by_hand(tiny), rel=1e-9)


def _by_hand(manifest: Manifest) -> float:
    model = manifest.model
    layer = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    layer += 3 * model.hidden_size * model.intermediate_size
    thinking, late = 3 * layer * 69, layer * 69 + model.vocab_size * model.hidden_size * 33
    return 4 * (thinking + late) / (thinking * 1.6 + 4 * late)
