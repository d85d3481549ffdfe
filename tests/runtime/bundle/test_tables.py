"""Tables as a device gets them: floats of the bundle's type, whatever the table is stored in."""

from __future__ import annotations

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from export_support import DTYPES, export, export_options
from gguf_files import tiny_config, write_gguf

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import WeightOptions
from dmtd_export.verify.stored import stored_weight
from dmtd_models.reference.testing import random_weights, write_tiny_checkpoint
from dmtd_runtime.bundle import tables
from dmtd_runtime.bundle.manifest import load_manifest
from dmtd_runtime.bundle.tables import table_parts

TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weights", ["float", "int4-symmetric", "int8"])
def test_a_table_is_its_values_in_the_bundles_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, dtype: str
) -> None:
    """Held to the reading of verification, rounded by the library that has the type; in parts of 3 rows."""
    monkeypatch.setattr(tables, "PART_VALUES", 3 * 64 + 1)
    source = write_tiny_checkpoint(tmp_path / "m", layers=2)
    export(source, tmp_path / "b", formats=WeightOptions(weights=weights), target="tensorrt", dtype=dtype)
    check(tmp_path / "b", dtype)


def test_a_table_of_a_format_with_minimums(tmp_path: Path) -> None:
    config = tiny_config("llama", hidden_size=64, tie_word_embeddings=True)
    weights = random_weights(config, seed=3)
    blocks = gguf.quants.quantize(weights[TABLE], gguf.GGMLQuantizationType.Q4_1)
    source = write_gguf(tmp_path / "m.gguf", config, weights, stored={TABLE: (blocks, "Q4_1")})
    formats = WeightOptions(weights_embedding="keep", weights_lm_head="keep")
    export_bundle(source, tmp_path / "b", export_options(decoding_layers=1, cycle_length=2, formats=formats))
    assert load_manifest(tmp_path / "b").quantised[TABLE].minimums
    check(tmp_path / "b", "float32")


def check(bundle: Path, dtype: str) -> None:
    manifest = load_manifest(bundle)
    expected = np.asarray(stored_weight(bundle, manifest, TABLE), np.float32).astype(DTYPES[dtype])
    got = np.concatenate(list(table_parts(bundle, manifest, TABLE)))
    assert got.nbytes == manifest.table_bytes(TABLE) == expected.nbytes
    np.testing.assert_array_equal(got, expected.reshape(-1).view(np.uint8))


def test_bfloat16_is_rounded_to_even() -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    values[:4] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF], np.uint32).view(
        np.float32
    )  # ties, and beside
    expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(tables._rounded(values, "bfloat16"), expected)
