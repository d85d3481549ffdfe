"""Engines of the simulator: engine graphs as they are, which it executes in ONNX Runtime on the CPU.

They share everything with the other backends' but the library: graphs, profiles, record. So what a runtime does with engines
can be run, and its numbers checked, on a machine without a GPU.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from dmtd_export.engines.network_check import check_attention_nodes
from dmtd_export.graphs.engine import EngineGraph, stored_weights
from dmtd_runtime.bundle.engine_record import EngineFile, ProfileInfo
from dmtd_runtime.bundle.manifest import sha256_of


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
