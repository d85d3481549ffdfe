"""What the graphs of a bundle are written from, read back from the bundle itself: its config.json and its manifest."""

from __future__ import annotations

import json
from pathlib import Path

from dmtd_export.bundle.split import spec_of
from dmtd_export.errors import ExportError
from dmtd_export.graphs.rows import GraphSpec
from dmtd_models.config.model import read_config
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    "tie_word_embeddings",
)


def graph_spec(bundle: Path, manifest: Manifest) -> GraphSpec:
    """What a graph over the bundle's weights file is written from.

    Raises:
        ExportError: the bundle has no config.json that describes its weights.
    """
    path, model = bundle / contract.CONFIG_FILE, manifest.model
    if contract.CONFIG_FILE not in manifest.files:
        raise ExportError(f"{bundle} has no {path.name} to write graphs from; export the bundle again")
    config, _ = read_config(json.loads(path.read_text(encoding="utf-8")))
    for name in _SAME:
        if getattr(config, name) != getattr(model, name):
            raise ExportError(
                f"{path}: {name} is {getattr(config, name)}, the manifest says {getattr(model, name)}; export the bundle again"
            )
    return GraphSpec(
        config=config,
        dmtd=spec_of(manifest.cycle),
        dtype=model.dtype,
        kv_dtype=model.cache_dtype,
        weights=manifest.weights,
        quantised=manifest.quantised,
    )
