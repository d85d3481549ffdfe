"""A bundle's weights handed to sessions as initializers: on a GPU, each once, whichever graphs read it; on the CPU only where
links lie between a graph and the weights file, which ONNX Runtime would not follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_runtime.backends.onnxruntime.binding import value_at
from dmtd_runtime.backends.onnxruntime.memory import Buffer, GpuMemory
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import DTYPE_BYTES, GraphInfo, Manifest
from dmtd_runtime.device.base import Address, aligned
from dmtd_runtime.device.uploading import Uploader
from dmtd_runtime.ort.library import import_onnxruntime
from dmtd_runtime.ort.links import path_problem

FOLDED = (contract.SCALES, contract.MINIMUMS)


def weights_of(manifest: Manifest, graphs: Iterable[GraphInfo]) -> dict[str, tuple[int, int, tuple[int, ...], str]]:
    """Initializers of several graphs by name: (offset in the weights file, bytes, shape, dtype)."""
    found = {}
    for name, dialect in {name: graph.dialect for graph in graphs for name in graph.weights}.items():
        parts = [manifest.weights[part] for part in contract.stack_parts(name)]
        tail, dtype = manifest.read_as(contract.stack_parts(name)[0], dialect)
        shape = (sum(part.shape[0] for part in parts), *tail)
        found[name] = (parts[0].offset, sum(part.length for part in parts), shape, dtype)
    return found


def is_folded(manifest: Manifest, name: str) -> bool:
    """Whether an initializer is read by constants alone, which ONNX Runtime computes when it opens a session.

    Such are minimums of blocks, and scales that are not stored in the model's type: no kernel takes them as they stand.
    """
    kind, part = _kind(manifest, name), contract.stack_parts(name)[0]
    return kind == contract.MINIMUMS or (
        kind == contract.SCALES and manifest.weights[part].dtype != manifest.model.dtype
    )


def _kind(manifest: Manifest, name: str) -> str | None:
    """Which part of quantised weights an initializer holds; None for floats."""
    part = contract.stack_parts(name)[0]
    return None if manifest.quantised_weight(part) is None else part.rpartition(".")[2]


def weight_bytes(manifest: Manifest, graphs: Iterable[GraphInfo]) -> int:
    """What :func:`upload_weights` allocates, and the constants that ONNX Runtime makes of the others, in the model's type."""
    width, total = DTYPE_BYTES[manifest.model.dtype], 0
    for name, (_, num_bytes, shape, _) in weights_of(manifest, graphs).items():
        total += aligned(math.prod(shape) * width if is_folded(manifest, name) else num_bytes)
    return total


def upload_weights(
    directory: Path, manifest: Manifest, graphs: Iterable[GraphInfo], memory: GpuMemory, session: Any
) -> Mapping[str, Any]:
    """Upload what kernels read, and give it as OrtValues by name. ``session`` is any one of the provider's."""
    uploader, values = Uploader(memory.cuda), {}
    for name, (offset, num_bytes, shape, dtype) in weights_of(manifest, graphs).items():
        if is_folded(manifest, name):
            continue
        address = memory.cuda.alloc(num_bytes, name)
        data = np.memmap(directory / contract.WEIGHTS_FILE, np.uint8, "r", offset=offset, shape=(num_bytes,))
        uploader.upload(Address(address), data)
        buffer = Buffer(address=address, shape=shape, dtype=dtype, array=None)
        values[name] = value_at(session, buffer, memory.device)
    return values


def mapped_weights(
    directory: Path, manifest: Manifest, graphs: Iterable[GraphInfo], *, folded: bool = False
) -> Mapping[str, Any]:
    """What the graphs read, as OrtValues over the mapped file; empty where ONNX Runtime is to read the file itself.

    So it is with 4 bits a value too, and with floats of 8, which numpy has not: such a graph is not run where links lead to its
    weights.
    ``folded``: scales and minimums alone, of which ONNX Runtime makes constants, whatever else it is given of them.
    """
    places = weights_of(manifest, [graph for graph in graphs if path_problem(directory / graph.file)])
    if folded:
        places = {name: place for name, place in places.items() if _kind(manifest, name) in FOLDED}
    if any(dtype in ("uint4", "float8_e4m3fn") for _, _, _, dtype in places.values()):
        return {}
    from_array = import_onnxruntime().OrtValue.ortvalue_from_numpy
    return {
        name: from_array(np.memmap(directory / contract.WEIGHTS_FILE, dtype, "r", offset=offset, shape=shape))
        for name, (offset, _, shape, dtype) in places.items()
    }
