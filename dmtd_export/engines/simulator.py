"""Engines of the simulator: engine graphs as they are, which it executes in ONNX Runtime on the CPU.

They share everything with the other backends' but the library: graphs, profiles, record. So what a runtime does with engines
can be run, and its numbers checked, on a machine without a GPU.
"""

from __future__ import annotations

from importlib.resources import files as resource_files
from pathlib import Path

import onnx

from dmtd_export.engines.network_check import check_attention_nodes
from dmtd_export.engines.weights import copy_weights
from dmtd_export.graphs.engine import EngineGraph, stored_weights
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.engine_record import EngineFile, ProfileInfo
from dmtd_runtime.bundle.manifest import FileInfo, Manifest, sha256_of


def write_simulator_engine(directory: Path, graph: EngineGraph, profiles: tuple[ProfileInfo, ...]) -> EngineFile:
    """Write the graph into ``directory``, where the weights file must stand too when it is loaded."""
    check_attention_nodes(graph.model)
    path = directory / f"{graph.name}.onnx"
    onnx.save_model(graph.model, path)
    return EngineFile(
        graph=graph.name,
        file=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        weight_bytes=sum(stored_weights(graph.model).values()),
        scratch_bytes=None,
        inputs=graph.inputs,
        outputs=graph.outputs,
        tables=graph.tables,
        aliases=graph.aliases,
        profiles=profiles,
    )


def copy_companions(bundle: Path, directory: Path, manifest: Manifest) -> dict[str, FileInfo]:
    """What engines of the simulator need beside them: the weights file, and valid inputs for trying them by hand."""
    weights = copy_weights(bundle, directory, manifest)
    loader = resource_files("dmtd_export").joinpath("bundle", "polygraphy_data.py").read_text(encoding="utf-8")
    (directory / contract.DATA_LOADER_FILE).write_text(loader, encoding="utf-8")
    return {contract.WEIGHTS_FILE: weights}
