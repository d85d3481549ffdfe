"""SmolLM2-135M, the real weights: every graph becomes an engine on the CPU, and holds its weights once.

Minutes of a library's work, so slow; ``test_build.py`` asks the same of tiny models.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_support import SMOLLM2_CACHE, rtx

from dmtd_export.bundle.export import export_bundle
from dmtd_export.engines.options import BuildOptions
from dmtd_export.engines.run import build_engines
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions
from dmtd_runtime.bundle.manifest import load_manifest
from study import smollm2

TABLE, LAYER, NORM = 49152 * 576, 576 * 576 * 2 + 192 * 576 * 2 + 3 * 1536 * 576 + 2 * 576, 576


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_graphs_build(tmp_path: Path, dtype: str) -> None:
    rtx()
    source = smollm2.fetch_smollm2(SMOLLM2_CACHE)
    export = ExportOptions(
        split=SplitOptions(decoding_layers=8, cycle_length=4), target="tensorrt", dtype=dtype, max_model_len=256
    )
    export_bundle(source, tmp_path, export)
    record = build_engines(tmp_path, BuildOptions(backend="tensorrt-rtx", max_num_seqs=2, fused=True)).record
    sizes = {engine.graph: engine.weight_bytes for engine in record.engines}
    rotary = 512 * 64
    expected = {"thinking": 22 * LAYER, "late_decode": 8 * LAYER + NORM, "full_pass": 30 * LAYER + NORM}
    for name, count in expected.items():
        assert 0 <= sizes[name] / 2 - count - rotary < 20_000, name
    stored = sum(info.length for info in load_manifest(tmp_path).weights.values())
    assert stored == 2 * (TABLE + 30 * LAYER + NORM + rotary)
    assert sizes["thinking"] + sizes["late_decode"] + 2 * TABLE <= 1.02 * stored
    assert record.build.peak_bytes <= 2.3 * sum(engine.bytes for engine in record.engines)
