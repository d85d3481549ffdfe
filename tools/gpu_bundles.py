"""Bundles for tools/gpu_check, made in seconds and without verification: small ones of real or random weights, and large
ones whose weights file is a ring of random values that the tensors share.

A device uploads every tensor to a place of its own, so a shared file costs the speed nothing and spares writing, hashing and
reading 8 GB. Such a bundle serves measurements only: its record of the weights has no fingerprints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from gpu_order import Wanted

import dmtd_export.bundle.export
from dmtd_export.bundle.export import export_bundle
from dmtd_export.bundle.weights import NUMPY_DTYPES, PAGE_BYTES, TensorSource, Written, tensor_groups
from dmtd_export.graphs.layers import COS, SIN
from dmtd_export.options import ExportOptions, WeightOptions
from dmtd_models.checkpoints.tensors import tensor_shapes
from dmtd_models.config.model import ModelConfig, SplitOptions, read_config
from dmtd_models.reference.rope import rotary_tables
from dmtd_models.reference.testing import write_tiny_checkpoint
from dmtd_runtime.bundle.manifest import FileInfo, WeightInfo, weights_may_overlap

RING_BYTES = 1 << 30  # far more than a GPU's cache holds, were the ring ever read as it is
RANDOM_VALUES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a model. ``ring``: its bundle's weights are a ring; else they are its own, or the real ones."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tie: bool = True
    ring: bool = False
    family: str = "qwen3"
    max_positions: int = 8192


TINY = {"layers": 5, "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 259}
RING = {"layers": 6, "hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 1024}
SMOLLM2 = {"layers": 30, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 49152}
QWEN3_06B = {"layers": 28, "hidden": 1024, "intermediate": 3072, "heads": 16, "kv_heads": 8, "head_dim": 128}
QWEN3_4B = {"layers": 36, "hidden": 2560, "intermediate": 9728, "heads": 32, "kv_heads": 8, "head_dim": 128}
SHAPES = {
    "tiny": Shape(**TINY, family="llama", tie=False, max_positions=96),
    "tiny-ring": Shape(**RING, ring=True, max_positions=96),
    "smollm2": Shape(**SMOLLM2, family="llama"),
    "qwen3-0.6b": Shape(**QWEN3_06B, vocab=151936, ring=True),
    "qwen3-4b": Shape(**QWEN3_4B, vocab=151936, ring=True),
}


def make_bundle(wanted: Wanted, place: Path, *, checkpoint: Path | None, max_num_seqs: int, max_model_len: int) -> Path:
    """The bundle at ``place``/bundle, unless it is there; ``checkpoint`` is a real one of that shape."""
    bundle, shape = place / "bundle", SHAPES[wanted.shape]
    if (bundle / "manifest.json").exists():
        return bundle
    assert not (shape.ring and wanted.weights), "a ring holds floats"
    source = checkpoint or place / "checkpoint"
    if checkpoint is None:
        shutil.rmtree(source, ignore_errors=True)
        (write_hollow if shape.ring else write_random)(source, shape)
    options = ExportOptions(
        split=SplitOptions(
            decoding_layers=wanted.late, cycle_length=wanted.tau, cycle_origin="prompt", prompt_input="thinking"
        ),
        dtype=wanted.dtype,
        formats=WeightOptions(weights=wanted.weights),
        target="all",
        max_num_seqs=max_num_seqs,
        max_model_len=min(max_model_len, shape.max_positions),
        verify=False,
    )
    logging.getLogger("dmtd.export").setLevel(logging.ERROR)  # that the weights are not trained is known here
    with contextlib.ExitStack() as patched:
        if shape.ring:
            patched.enter_context(mock.patch.object(dmtd_export.bundle.export, "write_weights", write_ring))
            patched.enter_context(weights_may_overlap())
        export_bundle(source, bundle, options)
    return bundle


def write_random(directory: Path, shape: Shape) -> None:
    """A small checkpoint of random weights."""
    write_tiny_checkpoint(
        directory,
        family=shape.family,
        layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie=shape.tie,
        dtype="bfloat16",
        max_positions=shape.max_positions,
    )


def write_hollow(directory: Path, shape: Shape) -> None:
    """config.json, and a model.safetensors that is a hole: names and shapes, zeros that take no disk."""
    raw: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tie,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw, indent=2))
    header: dict[str, Any] = {}
    offset = 0
    for name, size in tensor_shapes(read_config(raw)[0]).items():
        end = offset + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_ring(
    path: Path,
    source: TensorSource,
    config: ModelConfig,
    dtype: str,
    rotary_rows: int,
    _on_bytes: Callable[[int], None] | None = None,
    _quantisation: object = None,
) -> Written:
    """In place of ``write_weights`` of the exporter: matrices are places in a ring of random values, norms are ones."""
    kind = NUMPY_DTYPES[dtype]
    groups = [[(name, source.shape(name)) for name in group] for group in tensor_groups(config)]
    norms = [(name, shape) for group in groups for name, shape in group if "norm" in name]
    matrices = [group for group in groups if "norm" not in group[0][0]]
    sizes = [_bytes(kind, *(shape for _, shape in group)) for group in matrices]
    ring = _paged(max(*sizes, min(RING_BYTES, sum(sizes))))
    tables = zip((COS, SIN), rotary_tables(config.rope, config.head_dim, rotary_rows), strict=True)
    # Where two tensors began at one place, TensorRT would take them for one.
    infos, starts, position = {}, set[int](), 0
    for group, size in zip(matrices, sizes, strict=True):
        position = 0 if position + size > ring else position
        while position in starts:
            position += PAGE_BYTES
        starts.add(position)
        for name, shape in group:
            infos[name] = _info(dtype, tuple(shape), position, _bytes(kind, shape))
            position += infos[name].length
        position = _paged(position)
    end = _paged(max(info.offset + info.length for info in infos.values()))
    tail = [(name, np.ones(shape, kind)) for name, shape in norms]
    tail += [(name, np.ascontiguousarray(table.astype(kind))) for name, table in tables]
    values = np.random.default_rng(0).standard_normal(RANDOM_VALUES, dtype=np.float32) * np.float32(0.02)
    block, digest = np.ascontiguousarray(values.astype(kind)).view(np.uint8), hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        for start in range(0, end, block.nbytes):
            put(block[: end - start].data)
        for name, array in tail:
            infos[name] = _info(dtype, array.shape, file.tell(), array.nbytes)
            put(array.view(np.uint8).reshape(-1).data)
            put(b"\0" * (-file.tell() % PAGE_BYTES))
        stored = FileInfo(bytes=file.tell(), sha256=digest.hexdigest())
        return Written(weights=infos, quantised={}, file=stored)


def _bytes(kind: np.dtype[Any], *shapes: Sequence[int]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes) * kind.itemsize


def _paged(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _info(dtype: str, shape: tuple[int, ...], offset: int, length: int) -> WeightInfo:
    return WeightInfo(dtype=dtype, shape=shape, offset=offset, length=length, norm=0.0, probe=0.0)
