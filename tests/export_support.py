"""What the tests of export share: a tiny checkpoint, its expected tensors, and plain reading of bundles. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dmtd_export.bundle.export import export_bundle
from dmtd_export.options import ExportOptions
from dmtd_models.config.model import SplitOptions, read_config
from dmtd_models.reference.testing import random_weights
from dmtd_runtime.bundle.manifest import load_manifest

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "uint8": np.uint8}
PLAIN = {"decoding_layers": 1, "cycle_length": 3}  # what a plain tiny checkpoint must be told
WARNINGS_OF_PLAIN = 3  # no convention, not trained, no tokenizer


def export_options(**given: Any) -> ExportOptions:
    """Options of an export, those of the split among them."""
    split = {field.name: given.pop(field.name) for field in fields(SplitOptions) if field.name in given}
    return ExportOptions(split=SplitOptions(**split), **given)


def export(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Export without verification; returns the manifest as plain JSON."""
    given = {"max_num_seqs": 1, **options}
    if "num_thinking_layers" not in (source / "config.json").read_text():
        given = PLAIN | given
    export_bundle(source, output, export_options(**given))
    return read_manifest(output)


def read_manifest(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text())


def source_weights(checkpoint: Path, *, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The tensors that ``write_tiny_checkpoint`` wrote, made again rather than read."""
    config, _ = read_config(json.loads((checkpoint / "config.json").read_text()))
    return random_weights(config, seed=seed, dtype=dtype)


def stored_tensor(bundle: Path, manifest: dict[str, Any], name: str) -> np.ndarray:
    """One tensor of the weights file by the manifest's offset, read without the exporter's code."""
    info = manifest["weights"][name]
    with (bundle / "model.onnx.data").open("rb") as file:
        file.seek(info["offset"])
        raw = file.read(info["length"])
    return np.frombuffer(raw, DTYPES[info["dtype"]]).reshape(info["shape"])


def snapshot(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below ``directory`` by relative name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_whole(bundle: Path, weights_of: dict[str, str]) -> None:
    """Every file is what the manifest says, and the weights are of a checkpoint that is known."""
    load_manifest(bundle).check_files(bundle, hashes=True)
    assert snapshot(bundle)["model.onnx.data"] in weights_of
