"""A bundle's weights handed to sessions as initializers: on a GPU, each once, whichever graphs read it; on the CPU only where
links lie between a graph and the weights file, which ONNX Runtime would not follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime.backends.onnxruntime.binding import value_at
from dmtd_runtime.backends.onnxruntime.memory import Buffer, GpuMemory
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest
from dmtd_runtime.device.base import Address, aligned
from dmtd_runtime.device.uploading import Uploader
from dmtd_runtime.ort.library import import_onnxruntime
from dmtd_runtime.ort.links import path_problem


def weights_of(manifest: Manifest, graphs: Iterable[GraphInfo]) -> dict[str, tuple[int, int, tuple[int, ...], str]]:
    """Initializers of several graphs by name: (offset in the weights file, bytes, shape, dtype)."""
    found = {}
    for name, dialect in {name: graph.dialect for graph in graphs for name in graph.weights}.items():
        parts = [manifest.weights[part] for part in contract.stack_parts(name)]
        tail, dtype = manifest.read_as(contract.stack_parts(name)[0], dialect)
        shape = (sum(part.shape[0] for part in parts), *tail)
        found[name] = (parts[0].offset, sum(part.length for part in parts), shape, dtype)
    return found


def weight_bytes(manifest: Manifest, graphs: Iterable[GraphInfo]) -> int:
    """What :func:`upload_weights` allocates."""
    return sum(aligned(num_bytes) for _, num_bytes, _, _ in weights_of(manifest, graphs).values())


def upload_weights(
    directory: Path, manifest: Manifest, graphs: Iterable[GraphInfo], memory: GpuMemory, session: Any
) -> Mapping[str, Any]:
    """Upload what the graphs read, and give it as OrtValues by name. ``session`` is any one of the provider's."""
    uploader, values = Uploader(memory.cuda), {}
    for name, (offset, num_bytes, shape, dtype) in weights_of(manifest, graphs).items():
        address = memory.cuda.alloc(num_bytes, name)
        data = np.memmap(directory / contract.WEIGHTS_FILE, np.uint8, "r", offset=offset, shape=(num_bytes,))
        uploader.upload(Address(address), data)
        buffer = Buffer(address=address, shape=shape, dtype=dtype, array=None)
        values[name] = value_at(session, buffer, memory.device)
    return values


def mapped_weights(directory: Path, manifest: Manifest, graphs: Iterable[GraphInfo]) -> Mapping[str, Any]:
    """What the graphs read, as OrtValues over the mapped file; empty where ONNX Runtime is to read the file itself.

    So it is with 4 bits a value too, which numpy has not: such a graph is not run where links lead to its weights.
    """
    places = weights_of(manifest, [graph for graph in graphs if path_problem(directory / graph.file)])
    if any(dtype == "uint4" for _, _, _, dtype in places.values()):
        return {}
    from_array = import_onnxruntime().OrtValue.ortvalue_from_numpy
    return {
        name: from_array(np.memmap(directory / contract.WEIGHTS_FILE, dtype, "r", offset=offset, shape=shape))
        for name, (offset, _, shape, dtype) in places.items()
    }
