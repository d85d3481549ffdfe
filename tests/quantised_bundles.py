"""Small quantised bundles, for the tests of their verification."""

from __future__ import annotations

from pathlib import Path

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import Dtype, ExportOptions, Target, WeightOptions
from dmtd_models.config.model import SplitOptions
from dmtd_models.reference.testing import write_tiny_checkpoint

LAYERS = 4  # E1 T2 D1
ALL_KINDS = WeightOptions(weights="int4", weights_late="int8", weights_lm_head="int4", weights_embedding="int4")
WEIGHT = "model.layers.2.mlp.down_proj"


def make(
    root: Path, formats: WeightOptions, target: Target = "all", dtype: Dtype = "float32", **model: object
) -> tuple[Path, Path]:
    checkpoint = write_tiny_checkpoint(root / "model", layers=LAYERS, **model)
    options = ExportOptions(
        split=SplitOptions(encoding_layers=1, decoding_layers=1, cycle_length=2),
        max_num_seqs=2,
        max_model_len=64,
        formats=formats,
        target=target,
        dtype=dtype,
    )
    export_bundle(checkpoint, root / "bundle", options)
    return checkpoint, root / "bundle"
