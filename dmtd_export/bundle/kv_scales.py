"""Scales of int8 caches, measured over a calibration text by the bundle's own graphs with float caches.

    work/ (weights, thinking and late_decode over float caches), text --> rows of the caches --> a scale for each channel

The text runs in the model's cycles, heads and late steps, and plain: D's cache depends on which. Every row is kept in a
cache as it is read by attention, so keys stand there turned by their position. A turn moves a key's pair of channels
(i, i + head_dim / 2) on a circle. So from where the text's keys stand it is known how large each channel gets when the same key
comes at any other position: for pairs that turn fast both channels get the circle's radius, for slow ones, which never come
round, what the arc reaches. Values are not turned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.bundle.calibration import CalibrationSequence, CalibrationText
from dmtd_export.bundle.weights import map_tensor
from dmtd_models.progress import Progress, counter
from dmtd_runtime.backends.base import Backend, BackendOptions, SlotStep
from dmtd_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.cycle import CyclePlan, Position

Array = np.ndarray[Any, np.dtype[Any]]

HEADROOM = (
    1.5  # of the range of codes over the largest value in the text: less saturates elsewhere, more rounds coarser
)
SMALLEST = 2.0**-16  # of a layer's largest scale: a channel that was never used gets that
NOTHING = 1e-20  # the largest value of a layer that was never used


def measured_scales(work: Path, manifest: Manifest, text: CalibrationText, progress: Progress) -> dict[str, Array]:
    """Scales float32 [kv_heads * head_dim] by name, for the keys and the values of every layer.

    Args:
        work: a directory with weights file and graphs, which need be no whole bundle.
        manifest: says what stands there.
        text: what to run.
        progress: is told of tokens.

    Raises:
        BackendError: ONNX Runtime is missing, or cannot run the graphs.
    """
    longest = max(len(each.token_ids) for each in text.sequences)
    options = BackendOptions(full_pass="staged", max_model_len=min(longest, manifest.model.max_model_len))
    turns = _turns(work, manifest)
    done = counter(progress, "calibration", 2 * text.num_tokens)
    largest: Array | None = None
    backend = OnnxRuntimeBackend(work, manifest, options)
    try:
        for sequence in text.sequences:
            for plain in (False, True):
                _read(backend, CyclePlan(cycle=manifest.cycle, plain=plain), sequence)
                count = len(sequence.token_ids)
                [rows] = backend.read_rows(0, range(0, count, count))
                found = largest_values(rows, turns, manifest.model.max_model_len)
                largest = found if largest is None else np.maximum(largest, found)
                done(count)
    finally:
        backend.close()
    assert largest is not None, "a text has sequences"
    scales = scales_of(largest)
    names = [contract.kv_scale(layer, kind) for layer in range(manifest.model.num_layers) for kind in contract.KINDS]
    return dict(zip(names, scales.reshape(len(names), -1), strict=True))


def _read(backend: Backend, plan: CyclePlan, sequence: CalibrationSequence) -> None:
    """Run a whole sequence in slot 0, its tokens all known: chunks of rows with the gates that decoding gives them."""
    at = Position(prompt_len=sequence.prompt_len, given_len=len(sequence.token_ids))
    while at.in_prefill:
        step = plan.next_step(at, backend.max_rows)
        ids = sequence.token_ids[step.window.start : step.window.stop]
        backend.run([SlotStep(slot=0, step=step, ids=ids)], [at.fed], choose=True)
        at.commit(step)


def largest_values(rows: Array, turns: Array, positions: int) -> Array:
    """The largest size of every channel, were its row to stand at any of the first ``positions``.

    Args:
        rows: keys and values of every layer in turn, [2 * layers, kv_heads, rows, head_dim], from position 0 on.
        turns: radians that one position adds, [head_dim / 2].
        positions: of a sequence.

    Returns:
        float32 [2 * layers, kv_heads, head_dim].
    """
    largest: Array = np.abs(rows).max(axis=2).astype(np.float32)
    for layer, keys in enumerate(rows[0::2]):
        first, second = np.split(keys.astype(np.float64), 2, axis=-1)
        start = np.arctan2(second, first) - turns * np.arange(rows.shape[2])[:, None]  # at position 0
        stop, radius = start + turns * (positions - 1), np.hypot(first, second)
        both = [radius * _most_cosine(start - shift, stop - shift) for shift in (0.0, np.pi / 2)]
        largest[2 * layer] = np.concatenate(both, axis=-1).max(axis=1)
    return largest


def _most_cosine(start: Array, stop: Array) -> Array:
    """The largest |cosine| of the angles from ``start`` to ``stop``."""
    passes_a_peak = np.floor(stop / np.pi) > np.floor(start / np.pi)
    found: Array = np.where(passes_a_peak, 1.0, np.maximum(np.abs(np.cos(start)), np.abs(np.cos(stop))))
    return found


def _turns(work: Path, manifest: Manifest) -> Array:
    """Radians that one position adds to a key's pairs, by the bundle's own tables."""
    cos, sin = (map_tensor(work / contract.WEIGHTS_FILE, manifest.weights[name]) for name in contract.ROTARY_TABLES)
    found: Array = np.arctan2(sin[1].astype(np.float64), cos[1].astype(np.float64))
    return found


def scales_of(largest: Array) -> Array:
    """Scales float32 for the largest values of channels, [2 * layers, ...], with room for larger ones."""
    scales = np.maximum(largest, np.float32(NOTHING)) * np.float32(HEADROOM / contract.INT8_RANGE[1])
    least = scales.reshape(len(scales), -1).max(axis=1) * np.float32(SMALLEST)
    found: Array = np.maximum(scales, least.reshape(-1, *(1,) * (scales.ndim - 1)))
    return found
