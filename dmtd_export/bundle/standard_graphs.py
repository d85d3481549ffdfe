"""Adds the standard graphs to a bundle that was exported without them, from what the bundle itself holds.

The weights file is the same for both dialects, so only graphs and manifest are written: each file beside its place and then
renamed, the manifest last, so that a bundle is the old one or the new one at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from dmtd_export.bundle.split import spec_of
from dmtd_export.errors import ExportError
from dmtd_export.graphs.build import build_graph
from dmtd_export.graphs.rows import GraphSpec
from dmtd_models.config.model import read_config
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import FileInfo, GraphInfo, Manifest, load_manifest

CONFIG_FILE = "config.json"


def missing_graphs(manifest: Manifest) -> tuple[contract.GraphName, ...]:
    """The decoder graphs that the bundle lacks in the standard dialect."""
    present = {graph.name for graph in manifest.graphs if graph.dialect == contract.STANDARD}
    return tuple(name for name in contract.DECODER_GRAPHS if name not in present)


def with_standard_graphs(bundle: Path, manifest: Manifest) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest as it would be with the missing graphs, and the files to add, by name. Writes nothing.

    Raises:
        ExportError: the bundle has no config.json that describes its weights.
    """
    missing = missing_graphs(manifest)
    if not missing:
        return manifest, {}
    spec = _graph_spec(bundle, manifest)
    graphs: list[GraphInfo] = list(manifest.graphs)
    listed, contents = dict(manifest.files), {}
    for name in missing:
        model, info = build_graph(spec, name, contract.STANDARD)
        content = model.SerializeToString()
        listed[info.file] = FileInfo(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        contents[info.file] = content
        graphs.append(info)
    return replace(manifest, graphs=tuple(graphs), files=listed), contents


def write_standard_graphs(bundle: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Put the files of :func:`with_standard_graphs` into the bundle, the manifest last; nothing if another build just did."""
    with _locked(bundle):
        if not missing_graphs(load_manifest(bundle)):
            return
        for file, content in {**contents, contract.MANIFEST_FILE: manifest.to_json().encode()}.items():
            partial = bundle / f".{file}.partial"
            try:
                partial.write_bytes(content)
                if file != contract.MANIFEST_FILE:
                    onnx.checker.check_model(partial, full_check=True)
                partial.replace(bundle / file)
            finally:
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One build at a time, as far as the file system has locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _graph_spec(bundle: Path, manifest: Manifest) -> GraphSpec:
    again = "export the bundle again with --target tensorrt (or all)"
    if CONFIG_FILE not in manifest.files:
        raise ExportError(f"{bundle} has no standard graphs, and no {CONFIG_FILE} to make them from; {again}")
    config, _ = read_config(json.loads((bundle / CONFIG_FILE).read_text(encoding="utf-8")))
    model = manifest.model
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in sizes:
        if getattr(config, name) != getattr(model, name):
            raise ExportError(
                f"{bundle / CONFIG_FILE}: {name} is {getattr(config, name)}, the manifest says {getattr(model, name)}; {again}"
            )
    return GraphSpec(config=config, dmtd=spec_of(manifest.cycle), dtype=model.dtype, weights=manifest.weights)
