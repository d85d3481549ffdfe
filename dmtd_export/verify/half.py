"""A float32 twin of a half-precision bundle: the bundle's own graphs and weights, its half type replaced by float32.

It computes what the half-precision graphs mean without their rounding, so it can be held to the float32 margin. The
CPU has no bfloat16 kernels at all. The twin is derived from the graph files, not built anew: a fault in a file shows
in its twin. The rotary tables are the one exception: they are computed in float32, and the stored ones are checked by
themselves. Codes of quantised weights, and scales that are not of the bundle's type, stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from dmtd_export.bundle.weights import NUMPY_DTYPES, PAGE_BYTES, map_tensor, row_chunks
from dmtd_export.graphs.layers import COS, SIN
from dmtd_export.graphs.writer import ONNX_DTYPES
from dmtd_models.config.model import ModelConfig
from dmtd_models.reference.rope import rotary_tables
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import GraphInfo, Manifest, TensorInfo, WeightInfo

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT = onnx.TensorProto.FLOAT


def float32_twin(directory: Path, manifest: Manifest, target: Path, config: ModelConfig | None) -> Manifest:
    """Write the twin of ``directory`` into ``target`` and return its manifest (the list of files is not redone)."""
    tables: dict[str, Array] = {}
    if config is not None:
        rows = manifest.weights[COS].shape[0]
        tables = dict(zip((COS, SIN), rotary_tables(config.rope, config.head_dim, rows), strict=True))
    weights = _write_weights(directory, manifest, target / contract.WEIGHTS_FILE, tables)
    moved = {manifest.weights[name].offset: info.offset for name, info in weights.items()}
    half = ONNX_DTYPES[manifest.model.dtype]
    for graph in manifest.graphs:
        model = onnx.load(directory / graph.file, load_external_data=False)
        _cast_graph(model, half, moved)
        onnx.save_model(model, target / graph.file)
    return replace(
        manifest,
        model=replace(manifest.model, dtype="float32", kv_dtype="float32"),
        weights=weights,
        graphs=tuple(_cast_info(graph, manifest.model.dtype) for graph in manifest.graphs),
    )


def _write_weights(directory: Path, manifest: Manifest, path: Path, tables: dict[str, Array]) -> dict[str, WeightInfo]:
    """All tensors of the model's type as float32, the others as they are; those that stand one behind another still do."""
    infos: dict[str, WeightInfo] = {}
    source_end = 0
    with path.open("wb") as file:
        for name, info in sorted(manifest.weights.items(), key=lambda item: item[1].offset):
            if info.offset != source_end:
                file.write(b"\0" * (-file.tell() % PAGE_BYTES))
            source_end, start = info.offset + info.length, file.tell()
            tensor, dtype = tables.get(name), "float32" if info.dtype == manifest.model.dtype else info.dtype
            for rows in row_chunks(map_tensor(directory / contract.WEIGHTS_FILE, info) if tensor is None else tensor):
                made = np.ascontiguousarray(rows.astype(NUMPY_DTYPES[dtype], copy=False))
                file.write(made.view(np.uint8).data)
            infos[name] = replace(info, dtype=dtype, offset=start, length=file.tell() - start)
    return infos


def _cast_graph(model: onnx.ModelProto, half: int, moved: dict[int, int]) -> None:
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry for entry in tensor.external_data}
            place["offset"].value = str(moved[int(place["offset"].value)])
            if tensor.data_type == half:
                tensor.data_type = FLOAT
                place["length"].value = str(2 * int(place["length"].value))
        elif tensor.data_type == half:
            array = np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in graph.node:
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == half:
                    attribute.i = FLOAT


def _cast_info(graph: GraphInfo, half: str) -> GraphInfo:
    def cast(infos: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
        return tuple(replace(info, dtype="float32") if info.dtype == half else info for info in infos)

    return replace(graph, inputs=cast(graph.inputs), outputs=cast(graph.outputs))
