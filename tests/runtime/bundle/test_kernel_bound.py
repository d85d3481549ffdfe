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


@pytest.fixture(params=["avx512"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr("dmtd_runtime.bundle.kernel_bound.instruction_set", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("instructions", "bits", "batch", "bound"),
    [
        # us: T 2335.7, D 849.3, lm_head 453.0; four rows of T cost 1.18 of one: 4 x 3638.0 / (2756.1 + 4 x 1302.3)
        ("avx512", 4, 1, 1.8269),
        # T 3270.0, D 1189.1, lm_head 934.3, 1.09: 4 x 5393.4 / (3564.3 + 4 x 2123.4)
        ("avx512", 8, 1, 1.7892),
        # T 2413.6, D 877.7, lm_head 481.3, 1.57: 4 x 3772.5 / (3789.3 + 4 x 1359.0)
        ("avx2", 4, 1, 1.6358),
        # T 3270.0, D 1189.1, lm_head 651.2, 1.54: 4 x 5110.2 / (5035.8 + 4 x 1840.3)
        (None, 4, 1, 1.6490),
        # at 2 sequences 8 rows of T against 2: 4 x 3638.0 x 1.06 / (2335.7 x 1.42 + 4 x 1302.3 x 1.06)
        ("avx512", 4, 2, 1.7451),
    ],
    indirect=["instructions"],
)
def test_bounds_of_smollm2(tiny: Manifest, instructions: str | None, bits: int, batch: int, bound: float) -> None:
    assert kernel_bound(smollm2(tiny, bits), 0, batch) == pytest.approx(bound, abs=2e-4)


def test_long_contexts_read_caches(tiny: Manifest) -> None:
    model = smollm2(tiny, 4)
    bounds = [kernel_bound(model, context) for context in (0, 1000, 100_000)]
    assert None not in bounds and sorted(bounds) == bounds  # T's cache is read once a cycle


def test_int8_caches_are_read_faster_but_not_by_a_refill(tiny: Manifest, instructions: str) -> None:
    """Where caches are all: of T four rows cost 1.21 of one; a value costs 165 ps, and 315 as a float."""
    model = smollm2(tiny, 4)
    int8 = replace(model, model=replace(model.model, kv_dtype="int8"))
    assert kernel_bound(model, 1e12) == pytest.approx(4 * 30 / (22 + 4 * 8), abs=1e-4)
    assert kernel_bound(int8, 1e12) == pytest.approx(4 * 30 / (22 * 1.21 + 4 * 8), abs=1e-4)
    # us at a context of 100,000, 64 values a row and layer: T 23232, D 8448 beside the weights' 2335.7 x 1.18 and 1302.3
    bound = 4 * (3638.0 + 31680) / (2756.1 + 23232 * 1.21 + 4 * (1302.3 + 8448))
    assert kernel_bound(int8, 100_000) == pytest.approx(bound, abs=2e-4)


def test_floats_have_the_bound_of_their_bytes_alone(tiny: Manifest) -> None:
    assert kernel_bound(replace(tiny, quantised={}), 0) is None


def test_every_matrix_of_a_bundle_counts_once(tiny: Manifest, instructions: str) -> None:
    """A tied embedding counts as lm_head, for that is what multiplies by it."""
    assert kernel_bound(tiny, 0) == pytest.approx(_by_hand(tiny), rel=1e-9)


def _by_hand(manifest: Manifest) -> float:
    model = manifest.model
    layer = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    layer += 3 * model.hidden_size * model.intermediate_size
    thinking, late = 3 * layer * 30, layer * 30 + model.vocab_size * model.hidden_size * 16
    return 4 * (thinking + late) / (thinking * 1.18 + 4 * late)
