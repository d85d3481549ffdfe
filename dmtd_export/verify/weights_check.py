"""The stored weights against their source: every tensor of the checkpoint bit by bit, the rotary tables against the
reference's.

The fingerprints of level ``structure`` hold the file to the manifest; this holds the file to the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmtd_export.bundle.weights import NUMPY_DTYPES, map_tensor, row_chunks
from dmtd_export.graphs.layers import COS, SIN
from dmtd_export.verify.margins import MANTISSA_BITS, ROTARY_ERROR_A_POSITION
from dmtd_export.verify.report import Check, Divergence
from dmtd_export.verify.stored import quantised_rows
from dmtd_export.verify.structure import layer_of
from dmtd_models.checkpoints.checkpoint import Checkpoint
from dmtd_models.checkpoints.tensors import tensor_shapes
from dmtd_runtime.bundle import contract
from dmtd_runtime.bundle.manifest import CALIBRATED, Manifest

Array = np.ndarray[Any, np.dtype[Any]]
HALF_A_STEP = 1e-3  # of a step: the division that was rounded is itself rounded
LARGEST_FLOAT8 = 0x7E  # 448; above it stands NaN
SMALLEST_SCALE = 2.0**-20  # smaller blocks have scales that half precision rounds to few digits, or to zero

# What rounding over a text may move values by, in steps of their grids, for inputs take up what others lost. SmolLM2's rows
# move by 0.3 to 1.6 in root mean square and a value by 11 at most; from another layer's rows they are 3.7 or more.
MOVED_ROW = 3.0
MOVED_VALUE = 24.0


def check_architecture(manifest: Manifest, checkpoint: Checkpoint) -> Check:
    """The bundle was exported from a model of the checkpoint's dimensions."""
    model, config = manifest.model, checkpoint.config
    differs = [
        f"{key} {getattr(model, key)}, the checkpoint has {getattr(config, key)}"
        for key in ("family", "num_layers", "hidden_size", "vocab_size", "num_heads", "num_kv_heads", "head_dim")
        if getattr(model, key) != getattr(config, key)
    ]
    detail = f"{'; '.join(differs)}: another model's checkpoint" if differs else ""
    found = Divergence(graph=contract.MANIFEST_FILE, detail=detail) if differs else None
    return Check(
        name="manifest: the checkpoint's architecture",
        level="structure",
        ok=not differs,
        detail=detail,
        divergence=found,
    )


def check_source(
    directory: Path, manifest: Manifest, checkpoint: Checkpoint, on_done: Callable[[], None] = lambda: None
) -> Check:
    """Every stored tensor equals the checkpoint's, cast to the bundle's type or rounded to the nearest that its block has.

    What was rounded over a calibration text is near it (``MOVED_ROW``, ``MOVED_VALUE``): the text is no part of the bundle.
    """
    found = list(_unequal(directory, manifest, checkpoint, on_done))
    first = found[0] if found else None
    cases = len(tensor_shapes(checkpoint.config))
    return Check(
        name="weights: equal to the checkpoint's",
        level="structure",
        ok=first is None,
        cases=cases,
        detail="" if first is None else f"{len(found)} of {cases}: {first}",
        divergence=first,
    )


def _unequal(
    directory: Path, manifest: Manifest, checkpoint: Checkpoint, on_done: Callable[[], None]
) -> Iterator[Divergence]:
    for name, shape in tensor_shapes(checkpoint.config).items():
        on_done()
        if (found := manifest.shape_of(name)) != shape:
            got = "missing" if found is None else str(found)
            yield Divergence(
                graph=contract.WEIGHTS_FILE, layer=layer_of(name), got=got, expected=str(shape), detail=name
            )
            continue
        if name in manifest.quantised:
            if manifest.quantised[name].source == CALIBRATED:
                yield from itertools.islice(_moved_far(directory, manifest, name, checkpoint.read(name)), 1)
                continue
            exact = checkpoint.block_source(name) == manifest.quantised[name].source
            yield from itertools.islice(_unlike(directory, manifest, name, checkpoint.read(name), exact=exact), 1)
            continue
        info = manifest.weights[name]
        stored, source = map_tensor(directory / contract.WEIGHTS_FILE, info), checkpoint.read(name)
        for mine, theirs in zip(row_chunks(stored), row_chunks(source), strict=True):
            cast = theirs.astype(NUMPY_DTYPES[info.dtype], copy=False)
            differs = np.asarray(mine != cast)
            if differs.any():
                at = np.unravel_index(int(differs.argmax()), differs.shape)
                yield Divergence(
                    graph=contract.WEIGHTS_FILE,
                    layer=layer_of(name),
                    expected=float(cast[at]),
                    got=float(mine[at]),
                    detail=f"{name} is not the checkpoint's tensor; an adapter that was merged is given with --adapter",
                )
                break


def _unlike(directory: Path, manifest: Manifest, name: str, source: Array, *, exact: bool) -> Iterator[Divergence]:
    """Quantised values that are not the nearest to the source's which their block has; ``exact``: not the source's own."""
    first, fmt, how = 0, manifest.quantised[name], "in" if exact else "rounded to"
    for values, codes, scales in quantised_rows(directory, manifest, name):
        wanted = np.asarray(source[first : first + len(values)], dtype=np.float32)
        if fmt.float8:
            wrong = _not_nearest_float8(wanted - values, codes, scales)
        else:
            wrong = wanted != values if exact else _not_nearest(wanted - values, codes, scales, 2**fmt.bits - 1)
        if wrong.any():
            row, column = (int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
            yield Divergence(
                graph=contract.WEIGHTS_FILE,
                layer=layer_of(name),
                expected=float(wanted[row, column]),
                got=float(values[row, column]),
                detail=f"{name}[{first + row}, {column}] is not the checkpoint's value {how} {fmt.name}",
            )
        first += len(values)


def _moved_far(directory: Path, manifest: Manifest, name: str, source: Array) -> Iterator[Divergence]:
    """Rows of a matrix that was rounded over a text, which lie further from the source's than that moves them."""
    first = 0
    for values, _, scales in quantised_rows(directory, manifest, name):
        wanted = np.asarray(source[first : first + len(values)], dtype=np.float32)
        steps = np.maximum(np.abs(wanted - values) - SMALLEST_SCALE, 0) / np.maximum(np.abs(scales), SMALLEST_SCALE)
        moved, furthest = np.sqrt(np.square(steps).mean(-1)), steps.max(-1)
        wrong = ~((moved <= MOVED_ROW) & (furthest <= MOVED_VALUE))
        if wrong.any():
            row = int(wrong.argmax())
            column = int(steps[row].argmax())
            yield Divergence(
                graph=contract.WEIGHTS_FILE,
                layer=layer_of(name),
                expected=float(wanted[row, column]),
                got=float(values[row, column]),
                detail=f"{name}[{first + row}] is {moved[row]:.1f} steps of its grid from the checkpoint's row in root mean "
                f"square, {furthest[row]:.1f} at most; expected {MOVED_ROW:g} and {MOVED_VALUE:g} or less",
            )
        first += len(values)


def _not_nearest(apart: Array, codes: Array, scales: Array, last: int) -> Array:
    """Where a value, ``apart`` from the source's, is not the nearest of its block; codes at either end have nothing beyond."""
    outside = ((codes == 0) & (apart * scales < 0)) | ((codes == last) & (apart * scales > 0))
    wrong: Array = ~((np.abs(apart) <= (0.5 + HALF_A_STEP) * np.abs(scales) + SMALLEST_SCALE) | outside)
    return wrong


def _not_nearest_float8(apart: Array, codes: Array, scales: Array) -> Array:
    """As :func:`_not_nearest` of floats of 8 bits, whose step is an eighth of the power of two below them."""
    steps = np.ldexp(scales, np.maximum(codes >> 3 & 15, 1).astype(np.int32) - 10)
    outside = ((codes & 0x7F) == LARGEST_FLOAT8) & (np.where(codes & 0x80, -apart, apart) > 0)
    wrong: Array = ~((np.abs(apart) <= (0.5 + HALF_A_STEP) * steps + SMALLEST_SCALE) | outside)
    return wrong


def check_rotary(directory: Path, manifest: Manifest, expected: tuple[Array, Array]) -> Check:
    """The stored tables against float32 ones of the reference, [rows, head_dim / 2] each."""
    worst, margin, first = 0.0, 0.0, None
    for name, wanted in zip((COS, SIN), expected, strict=True):
        info = manifest.weights[name]
        got = map_tensor(directory / contract.WEIGHTS_FILE, info).astype(np.float32)
        bits = MANTISSA_BITS.get(info.dtype, 23)
        limit = ROTARY_ERROR_A_POSITION * (1 + np.arange(len(wanted)))[:, None] + np.abs(wanted).max() * 2.0**-bits
        apart = np.abs(got - wanted)
        worst, margin = max(worst, float(apart.max())), max(margin, float(limit.max()))
        bad = ~(apart <= limit)
        if bad.any() and first is None:
            row, column = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
            first = Divergence(
                graph=contract.WEIGHTS_FILE,
                position=row,
                expected=float(wanted[row, column]),
                got=float(got[row, column]),
                detail=f"{name}[{row}, {column}]: the rotary table does not follow from the model's rope parameters",
            )
    return Check(
        name="rotary tables against the reference",
        level="oracle",
        ok=first is None,
        worst=worst,
        margin=margin,
        unit="absolute",
        cases=2 * len(expected[0]),
        detail="" if first is None else str(first),
        divergence=first,
    )
