"""A twin of a quantised bundle whose products do not round their inputs: the bundle's own graphs over the same weights file.

It computes what the stored weights mean, so it can be held to the float32 margin. It is derived from the graph files: a fault
in a file shows in its twin. Nothing else is changed in it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx

from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest


def exact_twin(directory: Path, manifest: Manifest, target: Path) -> Manifest:
    """Write the twin of ``directory`` into ``target`` and return its manifest (the list of files is not redone)."""
    source = (directory / contract.WEIGHTS_FILE).resolve()
    try:
        os.link(source, target / contract.WEIGHTS_FILE)
    except OSError:  # another disk, or one without a second name for a file
        shutil.copyfile(source, target / contract.WEIGHTS_FILE)
    for graph in manifest.graphs:
        model = onnx.load(directory / graph.file, load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                level = next(attribute for attribute in node.attribute if attribute.name == "accuracy_level")
                level.i = 0
        onnx.save_model(model, target / graph.file)
    return manifest
