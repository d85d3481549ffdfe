"""How high a verification can go on this machine, and why not higher: torch, ONNX Runtime, memory, disk."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dmtd_export.verify.report import LEVELS, Level
from dmtd_models.config.model import ModelConfig
from dmtd_runtime.bundle.manifest import Manifest
from dmtd_runtime.machine.hardware import memory_bytes

CycleScope = Literal["all", "few", "none"]
LARGE_BYTES = 4 << 30  # float32 weights beyond which whole cycles take minutes
LARGE_IN_BLOCKS_BYTES = 32 << 20  # the same of quantised weights, as they stand
WORKING_BYTES = 1 << 30  # interpreter, libraries, activations, caches of a few dozen rows
PREPACKED_COPIES = 2.2  # ONNX Runtime's prepacked weights of a fused pair beside the mapped file
DISK_LEFT_BYTES = 64 << 20
LOGIT_ROWS, LOGIT_ROWS_A_CYCLE = 600, 50  # rows of logits alive at a time, reference and graphs together


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will run. ``prepack``: whole cycles run as they are deployed, with ONNX Runtime's own copies of weights.

    ``in_floats``: of a quantised bundle, products over 8 bits run as ones over floats, for which there is room.
    """

    level: Level
    note: str = ""
    cycles: CycleScope = "all"
    prepack: bool = True
    in_floats: bool = False
    notes: tuple[str, ...] = ()


def make_plan(directory: Path, manifest: Manifest, wanted: Level | None, config: ModelConfig | None) -> Plan:
    """The highest level that can run, at most ``wanted``."""
    highest: Level = wanted or "oracle"
    for ceiling, reason in _limits(directory, manifest, config, wants_torch=highest == "oracle"):
        if LEVELS.index(ceiling) < LEVELS.index(highest):
            return _finish(directory, manifest, ceiling, f"level lowered to {ceiling}: {reason}")
    note = f"level {highest}, as asked" if wanted is not None and wanted != "oracle" else ""
    return _finish(directory, manifest, highest, note)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    return memory_bytes()[1]


def scratch_directory(directory: Path) -> Path:
    """Where the float32 cast of a half-precision bundle is written: beside it, or where temporary files go."""
    beside = directory.absolute().parent
    return beside if os.access(beside, os.W_OK) else Path(tempfile.gettempdir())


def float32_bytes(manifest: Manifest) -> int:
    """Bytes of the weights that graphs are run over: floats as float32, quantised ones as they stand."""
    in_blocks = {part for name in manifest.quantised for part in manifest.parts_of(name)}
    return sum(
        info.length if name in in_blocks else int(np.prod(info.shape)) * 4 for name, info in manifest.weights.items()
    )


def twin_bytes(manifest: Manifest) -> int:
    """Bytes of the weights of a quantised bundle's twin: as they stand, and those of 8 bits as floats too."""
    in_8_bits = (manifest.shape_of(name) for name, fmt in manifest.quantised.items() if fmt.bits == 8)
    return float32_bytes(manifest) + sum(math.prod(shape) * 4 for shape in in_8_bits if shape)


def least_bytes(manifest: Manifest) -> int:
    """Memory without which no graph is run: the largest weight, as float64 and twice as float32, and logits."""
    shapes = [info.shape for info in manifest.weights.values()]
    shapes += [shape for name in manifest.quantised if (shape := manifest.shape_of(name))]
    largest = max(int(np.prod(shape)) * 4 for shape in shapes)
    rows = max(LOGIT_ROWS, LOGIT_ROWS_A_CYCLE * manifest.cycle.cycle_length)
    return 4 * largest + rows * manifest.model.vocab_size * 8 + WORKING_BYTES


def _limits(
    directory: Path, manifest: Manifest, config: ModelConfig | None, *, wants_torch: bool
) -> list[tuple[Level, str]]:
    """Every (ceiling, reason) that holds here, the lowest ceiling first."""
    limits: list[tuple[Level, str]] = []
    if not installed("onnxruntime"):
        limits.append(("structure", 'ONNX Runtime is not installed; pip install "dmtd[cpu]"'))
    memory, least = available_bytes(), least_bytes(manifest)
    if memory is not None and memory < least:
        limits.append(("structure", f"{memory / 1e9:.1f} GB of memory are available, {least / 1e9:.1f} GB are needed"))
    if manifest.model.dtype != "float32":
        scratch = scratch_directory(directory)
        free, needed = shutil.disk_usage(scratch).free, float32_bytes(manifest)
        if free < needed + DISK_LEFT_BYTES:
            reason = f"its float32 cast needs {needed / 1e9:.1f} GB in {scratch}, {free / 1e9:.1f} GB are free"
            limits.append(("structure", reason))
    if not installed("torch"):
        limits.append(("graphs", 'PyTorch is not installed; pip install "dmtd[oracle]"'))
    elif wants_torch and (problem := _import_problem("torch")) is not None:
        limits.append(("graphs", f"PyTorch cannot be imported ({problem})"))
    if config is None:
        limits.append(
            (
                "graphs",
                "the bundle has no config.json to build the reference from, or none that can be read; "
                "name its source with --checkpoint",
            )
        )
    return limits


def _finish(directory: Path, manifest: Manifest, level: Level, note: str) -> Plan:
    """How whole cycles run at this level; what a large model goes without is said in a note."""
    memory, weights = available_bytes(), float32_bytes(manifest)
    cycles: CycleScope = "few" if weights > LARGE_BYTES else "all"
    notes = ["whole cycles: fewer prompts and variants, because the model is large"] if cycles == "few" else []
    if manifest.quantised and cycles == "all" and weights > LARGE_IN_BLOCKS_BYTES:
        cycles = "few"
        notes = ["whole cycles: fewer prompts and variants, because products over blocks that round no inputs are slow"]
    prepack = True
    if memory is not None and memory < weights + least_bytes(manifest):
        cycles, prepack = "none", False
        notes = [
            "whole cycles were not run: the float32 weights do not fit into memory "
            f"({memory / 1e9:.1f} GB available, {(weights + least_bytes(manifest)) / 1e9:.1f} GB needed); "
            "each graph was, its weights read from the file in turn"
        ]
    elif memory is not None and memory < PREPACKED_COPIES * weights + least_bytes(manifest):
        prepack = False
        notes.append(
            "whole cycles read their weights from the page cache: memory is short of ONNX Runtime's own copies"
        )
    if level == "structure":
        return Plan(level=level, note=note)
    twin = twin_bytes(manifest)
    in_floats = shutil.disk_usage(scratch_directory(directory)).free > twin + DISK_LEFT_BYTES
    if memory is not None:
        in_floats &= memory > PREPACKED_COPIES * twin + least_bytes(manifest)
    return Plan(level=level, note=note, cycles=cycles, prepack=prepack, in_floats=in_floats, notes=tuple(notes))


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _import_problem(module: str) -> str | None:
    """Why an installed module cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken library, or one too large for the memory, raises many kinds
        return " ".join(str(error).split()) or type(error).__name__
    return None
